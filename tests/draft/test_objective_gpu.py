"""The draft's objective on a CUDA device: once the rows are known, the host waits for nothing."""

from __future__ import annotations

import pytest
import torch

from conftest import tiny_model
from miles_spec.draft.modules import DraftHead
from miles_spec.draft.objective import DraftObjective, DraftRows, objective
from miles_spec.draft.spec import EAGLE, EAGLE3, MIMO, QWEN_MTP, DraftSpec
from miles_spec.kernels.layout import PackedLayout

pytestmark = pytest.mark.gpu

LENGTHS = [37, 200, 5, 64]


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize(
    ("family", "spec", "vocab"),
    [("llama", EAGLE, None), ("llama", EAGLE3, 32), ("qwen2", MIMO, None), ("qwen3", QWEN_MTP, 32)],
)
def test_waits_for_nothing(family: str, spec: DraftSpec, vocab: int | None, depth: int) -> None:
    device, g = torch.device("cuda"), torch.Generator().manual_seed(0)
    model = tiny_model(family, layers=4 if spec.reads == "aux" else 2)
    ids = None if vocab is None else torch.arange(vocab)
    head = DraftHead.attach(model, spec, ids, g).to(device, torch.bfloat16)
    embed = model.get_input_embeddings().weight.detach().to(device, torch.bfloat16)
    target_head = head.target_rows(model.lm_head.weight.detach().to(device, torch.bfloat16))
    layout = PackedLayout.make(LENGTHS, device)
    size, vocabulary = layout.tokens, model.config.vocab_size
    tokens = torch.randint(vocabulary, (size,), generator=g).to(device)
    mask = layout.positions >= 3
    hidden = torch.randn(size, model.config.hidden_size, generator=g).to(device, torch.bfloat16)
    states = torch.randn(size, head.width, generator=g).to(device, torch.bfloat16)
    scored = torch.full((size,), 5.0, device=device), torch.full((size,), -4.0, device=device)
    sizes = {"hidden": hidden.shape[1], "vocab": len(target_head), "dtype": torch.bfloat16}
    rows = DraftRows.make(layout, tokens, mask, depth=depth, **sizes)

    def run(given: DraftRows | None) -> tuple[torch.Tensor, DraftObjective]:
        head.zero_grad()
        got = objective(
            head,
            embed,
            target_head,
            hidden,
            states,
            layout,
            tokens,
            mask,
            *scored,
            depth=depth,
            loss="ramp",
            ramp=0.5,
            rule="target",
            temperature=1.0,
            given=given,
        )
        got.loss_sum.backward()
        return torch.cat([p.grad.flatten() for p in head.parameters()]), got

    expected, alone = run(None)  # compiles what there is to compile
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        grads, got = run(rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert got.rows == alone.rows and got.rows[0] == sum(n - 4 for n in LENGTHS)
    assert got.estimate == alone.estimate
    torch.testing.assert_close(grads, expected, rtol=2e-2, atol=2e-2 * float(expected.abs().max()))
