"""For each option of grpo, gkd, rollouts and rewards a value, and what it is given beside.

With it a run asks, trains or reports something else than without. What another test shows is named
in `ELSEWHERE`.
"""

FILE = "{tmp}/more.py"
MORE = """
import asyncio

def other(rollouts):
    return [r.token_ids[0] / 50 for r in rollouts]

async def slow(rollouts):
    await asyncio.sleep(0.4 if rollouts[0].token_ids[0] % 2 else 0)
    return [1.0]

class Again:
    def __init__(self, config):
        pass

    def __call__(self, turn):
        return [{"role": "tool", "content": "r"}] if turn.number < 4 else None
"""
EVEN = {"body": "[len(r.token_ids) if r.row['n'] % 2 else 1.0 for r in rollouts]"}
TWICE = {"num_iterations": 2}
"""The ratio differs from 1 in the second step."""
TALK = {"max_completion_length": 80, "multi_turn_scheduler": f"{FILE}:Again"}
AHEAD = {"use_vllm": True, "async_generate": True}
GRPO = {
    "loss_type": ("dapo", {}),
    "beta": (0.1, {}),
    "num_generations": (2, {}),
    "num_generations_eval": (2, {}),
    "steps_per_generation": (2, {}),
    "generation_batch_size": (8, {}),
    "num_iterations": (2, {}),
    "reward_funcs": ([f"{FILE}:other"], {}),
    "reward_weights": ([2.0], {}),
    "reward_timeout": (0.1, {"reward_funcs": [f"{FILE}:other", f"{FILE}:slow"]}),
    "advantage_estimator": ("rloo", {}),
    "scale_rewards": ("none", {}),
    "kl_in_reward": (True, {"beta": 0.1}),
    "epsilon": (0.5, TWICE),
    "epsilon_high": (0.5, TWICE),
    "delta": (1.3, TWICE),
    "cispo_max_ratio": (1.1, {**TWICE, "loss_type": "cispo"}),
    "tau_pos": (2.0, {**TWICE, "loss_type": "sapo"}),
    "tau_neg": (2.0, {**TWICE, "loss_type": "sapo"}),
    "importance_sampling_level": ("sequence", TWICE),
    "dynamic_sample": (True, EVEN),
    "max_resample_times": (1, {**EVEN, "dynamic_sample": True}),
    "overlong_filter": (True, {}),
    "top_entropy_quantile": (0.5, {}),
    "log_entropy": (True, {}),
    "rollout_importance_sampling_mode": ("sequence_mask", {}),
    "rollout_importance_sampling_threshold": (
        1.01,
        {"rollout_importance_sampling_mode": "token_truncate"},
    ),
    "log_rollout_offpolicy_metrics": (True, {}),
    "off_policy_sequence_mask_delta": (0.0, {}),
    "sync_ref_model": (True, {"beta": 0.1, "ref_model_sync_steps": 1}),
    "ref_model_sync_steps": (1, {"beta": 0.1, "sync_ref_model": True}),
    "ref_model_mixup_alpha": (
        0.3,
        {"beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 1},
    ),
    "log_completions": (True, {}),
    # generation: what an engine does with it is tested with the engines
    "max_completion_length": (6, {}),
    "temperature": (0.5, {}),
    "top_k": (3, {}),
    "top_p": (0.5, {}),
    "repetition_penalty": (1.5, {}),
    "stop_words": ([";"], {}),
    "rollout_engine": ("vllm", {}),
    "use_vllm": (True, {}),
    "async_generate": (True, {"use_vllm": True}),
    "max_staleness": (2, AHEAD),
    "partial_rollouts": (True, AHEAD),
    "multi_turn_scheduler": (f"{FILE}:Again", {"max_completion_length": 80}),
    "max_turns": (2, TALK),
}
STARTED = {
    "vllm_gpu_memory_utilization": 0.4,
    "vllm_max_model_len": 77,
    "vllm_enforce_eager": True,
    "vllm_enable_prefix_caching": False,
    "vllm_tensor_parallel_size": 2,
    "vllm_enable_lora": True,
    "sleep_level": 1,
}
"""What vLLM in the training processes is started with."""
ADDRESSES = {
    "vllm_server_host": (["a", "b"], ["http://a:8000", "http://b:8000"]),
    "vllm_server_port": ([1, 2], ["http://127.0.0.1:1", "http://127.0.0.1:2"]),
    "vllm_server_base_url": (["http://x:5/"], ["http://x:5"]),
}
GKD = {
    "teacher_model": "other",
    "teacher_model_type": "llama",
    "teacher_model_revision": "main",
    "offload_teacher_model": True,
    "beta": 0.1,
    "temperature": 0.5,
    "lmbda": 0.9,
    "seq_kd": True,
    "sft_alpha": 0.3,
}
REWARDS = {
    "cosine_min_len_value_wrong": (-0.9, {}),
    "cosine_max_len_value_wrong": (-0.1, {}),
    "cosine_min_len_value_correct": (2.0, {}),
    "cosine_max_len_value_correct": (0.1, {}),
    "cosine_max_len": (5, {}),
    "repetition_n_grams": (1, {}),
    "repetition_max_penalty": (-0.3, {}),
    "soft_max_length": (8, {}),
    "soft_cache_length": (6, {}),
}
ELSEWHERE = {
    "reward_model": "tests/e2e/test_reward_models.py",
    "router_replay_mode": "tests/parity/replay_case.py",
    "vllm_mode": "tests/e2e/test_vllm_run.py",
    "offload_optimizer": "tests/unit/test_vllm_colocate.py",
    "offload_model": "tests/unit/test_vllm_colocate.py",
    "native_slots": "tests/parity/test_native_rollout.py",
    "native_kv_gib": "tests/parity/test_native_rollout.py",
    "native_cuda_graphs": "tests/parity/test_native_rollout.py",
    "rlhf_type": "tests/unit/test_preference_options.py",
    "micro_batch_size": "tests/unit/test_balance.py",
    "global_batch_size": "tests/unit/test_balance.py",
    "truncation_strategy": "tests/unit/test_prompts.py",
    "ref_load": "tests/e2e/test_reference_adapters.py",
    "ref_adapter_load": "tests/e2e/test_reference_adapters.py",
}
SERVED = {"vllm_server_timeout": 3.5, "vllm_server_pass_dataset": True}
REFUSED = {"vllm_limit_mm_per_prompt": ({"image": 1}, "prompts here are text")}
