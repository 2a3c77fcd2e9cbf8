"""A small dense decoder with multi-token prediction in plain float64: no packing, no chunks.

Written from the papers (RMSNorm, rotary positions, grouped queries, SwiGLU; DeepSeek-V3, section
2.2). Only the names and the order of rows of the weights are megatron-core's.
Shapes: L tokens of one sample, H hidden size, D head size.
"""

import torch
import torch.nn.functional as F


class Decoder:
    """Computes with weights by canonical name, float64, of an architecture."""

    def __init__(self, shape, weights):
        self.shape, self.w = shape, weights

    def norm(self, x, name):
        scale = (x.square().mean(-1, keepdim=True) + self.shape.norm_epsilon).rsqrt()
        return x * scale * self.w[f"{name}.weight"]

    def turned(self, x_LND):
        size = x_LND.shape[-1]
        rates = self.shape.rotary_base ** -(torch.arange(0, size, 2).double() / size)
        angles = torch.arange(len(x_LND)).double()[:, None, None] * rates
        a, b = x_LND.chunk(2, -1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    def attention(self, x, name):
        s = self.shape
        each = s.num_attention_heads // s.num_query_groups
        qkv = x @ self.w[f"{name}.linear_qkv.weight"].t()
        qkv = qkv.view(len(x), s.num_query_groups, each + 2, s.kv_channels)
        q, k, v = qkv[:, :, :each], qkv[:, :, each], qkv[:, :, each + 1]
        q = self.turned(self.norm(q.flatten(1, 2), f"{name}.q_layernorm"))
        k = self.turned(self.norm(k, f"{name}.k_layernorm")).repeat_interleave(each, 1)
        v = v.repeat_interleave(each, 1)
        scores = torch.einsum("ind,jnd->nij", q, k) / s.kv_channels**0.5
        hidden = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
        chances = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        out = torch.einsum("nij,jnd->ind", chances, v).flatten(1)
        return out @ self.w[f"{name}.linear_proj.weight"].t()

    def layer(self, x, name):
        x = x + self.attention(self.norm(x, f"{name}.input_layernorm"), f"{name}.self_attention")
        y = self.norm(x, f"{name}.pre_mlp_layernorm")
        gate, up = (y @ self.w[f"{name}.mlp.linear_fc1.weight"].t()).chunk(2, -1)
        return x + (F.silu(gate) * up) @ self.w[f"{name}.mlp.linear_fc2.weight"].t()

    def logps(self, hidden, ids):
        """Log-probability of each id under the hidden state beside it."""
        logits = hidden @ self.w["output_layer.weight"].t()
        return logits.log_softmax(-1).gather(1, ids[:, None])[:, 0]

    def predictions(self, ids):
        """Log-probabilities of the tokens from the second on; then, by depth, of later ones."""
        embedded = self.w["embedding.word_embeddings.weight"][ids]
        hidden = embedded
        for i in range(self.shape.num_layers):
            hidden = self.layer(hidden, f"decoder.layers.{i}")
        hidden = self.norm(hidden, "decoder.final_norm")
        found = [self.logps(hidden[:-1], ids[1:])]
        for depth in range(self.shape.mtp_layers):
            name = f"mtp.layers.{depth}"
            # sees the tokens up to i + depth + 1 and predicts the one after
            later = torch.zeros_like(hidden)
            kept = max(0, len(ids) - depth - 1)
            later[:kept] = embedded[depth + 1 :]
            both = (self.norm(later, f"{name}.enorm"), self.norm(hidden, f"{name}.hnorm"))
            joined = torch.cat(both, -1) @ self.w[f"{name}.eh_proj.weight"].t()
            hidden = self.layer(joined, f"{name}.transformer_layer")
            hidden = self.norm(hidden, f"{name}.final_layernorm")
            seen = max(0, len(ids) - depth - 2)
            found.append(self.logps(hidden[:seen], ids[depth + 2 :]))
        return found
