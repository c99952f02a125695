#!/usr/bin/env bash
# transformers 5.24.0, torch 2.14.1 (Python 3.11, CPU, fp32): the causal language model DeepSeek V3.2 (random weights)
# gives a token other logits once further tokens stand behind it, as soon as a row is longer than `index_topk`.
#
# The indexer of its sparse attention scores keys by a ReLU, so that many scores are exactly 0, and keeps the
# `index_topk` best. Among equal scores torch.topk chooses by the length of the row, so appended tokens, which are
# themselves masked, change which earlier keys are kept. Up to `index_topk` tokens nothing moves. Whoever tests a cache
# or packed rows against a full forward should stay below it or compare rows of one length; sequences that are decoded
# token by token and then read at once need not agree.
#
# Output seen (largest difference of a logit, of some 0.6; with a leaky ReLU in its place both are of the first size):
#   row of 8 tokens, then 8 more:  2.5e-07
#   row of 12 tokens, then 4 more: 1.8e-01
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check 'transformers==5.24.0' 'torch==2.14.1'
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from transformers import AutoModelForCausalLM, DeepseekV32Config

config = DeepseekV32Config(
    vocab_size=199, hidden_size=64, intermediate_size=96, moe_intermediate_size=96, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8,
    qk_nope_head_dim=16, v_head_dim=16, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
    first_k_dense_replace=1, index_topk=8, index_head_dim=16, index_n_heads=2,
)
torch.manual_seed(0)
model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
moved = {8: 0.0, 12: 0.0}
with torch.no_grad():
    for _ in range(20):
        ids = torch.randint(20, 190, (1, 16))
        whole = model(ids, use_cache=False).logits
        for length, largest in moved.items():
            alone = model(ids[:, :length], use_cache=False).logits
            moved[length] = max(largest, float((alone - whole[:, :length]).abs().max()))
print(f"row of 8 tokens, then 8 more:  {moved[8]:.1e}")
print(f"row of 12 tokens, then 4 more: {moved[12]:.1e}")
assert moved[8] < 1e-5, "even a short row depends on what follows"
assert moved[12] > 1e-3, "longer rows no longer depend on what follows"
PYTHON
