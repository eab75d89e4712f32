"""A real GPTModel with our layer beside the same model with the host's SequentialMLP: 200 steps, the same losses."""

import pytest
import torch

from . import host
from .host import GPTModel, get_gpt_layer_local_spec, megatron_core

VOCABULARY, LENGTH, SEQUENCES, STEPS = 32, 12, 4, 200
CHANGES = {
    "init_method_std": 0.02, "moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 1e-2,
    "moe_z_loss_coeff": 1e-3, "moe_shared_expert_intermediate_size": 8, "num_moe_experts": 4,
}  # fmt: skip


def model(spec) -> GPTModel:
    torch.manual_seed(3)
    return GPTModel(
        config=host.config(**CHANGES), transformer_layer_spec=spec, vocab_size=VOCABULARY,
        max_sequence_length=LENGTH, position_embedding_type="rope",
    )  # fmt: skip


@pytest.mark.parametrize("parts_only", [False, True], ids=["layer", "parts"])
def test_200_steps_as_the_host(parts_only):
    spec = get_gpt_layer_local_spec(num_experts=CHANGES["num_moe_experts"])
    theirs, ours = model(spec), model(megatron_core.use_fastmoe_cpp(spec, parts_only=parts_only))
    ours.load_state_dict(theirs.state_dict())
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.3) for m in (theirs, ours)]
    positions = torch.arange(LENGTH).expand(SEQUENCES, -1)
    mask = torch.triu(torch.ones(LENGTH, LENGTH, dtype=torch.bool), 1)[None, None]
    generator = torch.Generator().manual_seed(0)
    first = last = None
    for number in range(STEPS):
        # counting upwards from anywhere, a quarter of the tokens noise: something to learn, never to the end
        starts, noise = (torch.randint(VOCABULARY, (SEQUENCES, n), generator=generator) for n in (1, LENGTH + 1))
        tokens = (starts + torch.arange(LENGTH + 1)) % VOCABULARY
        tokens = torch.where(torch.rand(tokens.shape, generator=generator) < 0.25, noise, tokens)
        losses = []
        for m, optimizer in zip((theirs, ours), optimizers, strict=True):
            optimizer.zero_grad()
            loss = m(tokens[:, :-1], positions, mask, labels=tokens[:, 1:]).mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[1] == pytest.approx(losses[0], rel=1e-4), f"step {number}"
        first, last = first or losses[0], losses[0]
    assert last < 0.8 * first
