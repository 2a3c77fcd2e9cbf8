"""LoRA: low-rank adapters on every projection, as PEFT has them."""
