"""What the contract's cases do not show: block borders, aliasing, far indices, gradients, compiled graphs, errors, what is launched."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton.runtime.interpreter as interpreter
from contract import Recorder, assert_close, assert_same_bits
from samples import checkpoints, normal, random_packed, weights, with_specials
from torch import Tensor

import taskloom
from taskloom.reference.masked.philox import philox_blocks
from taskloom.triton_kernels import masked as kernels
from taskloom.triton_kernels.launch import launch
from taskloom.triton_kernels.masked.masked_update import masked_update_kernel
from taskloom.triton_kernels.masked.packed_mask import pack_mask_kernel, unpack_mask_kernel
from taskloom.triton_kernels.masked.sparse_merge_kernels import sparse_merge_kernel

TIES = {"select": "magnitude", "density": 0.3, "elect": "sign_sum", "combine": "disjoint_mean"}

pytestmark = pytest.mark.usefixtures("triton_backend")


def _on(backend: str, function: Callable[[], Any]) -> Any:
    with taskloom.backend(backend):
        return function()


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs of 64 entries, so that borders between them are many."""
    for found in pkgutil.iter_modules(kernels.__path__):
        module = importlib.import_module(f"{kernels.__name__}.{found.name}")
        if hasattr(module, "entries_per_program"):
            monkeypatch.setattr(module, "entries_per_program", lambda numel, on_gpu=64: 64)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("rank", [(0, 1), (0, 64), (63, 65), (64, 129), (200, 333), (0, 333)])
def test_ties_across_blocks_go_to_the_lowest_index(rank: tuple[int, int]) -> None:
    values = torch.full((333,), -2.0)
    kept = taskloom.magnitude_mask(values, rank=rank)
    assert kept.nonzero().reshape(-1).tolist() == list(range(*rank))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("size", [1, 63, 64, 65, 500])
def test_block_borders(size: int) -> None:
    values = with_specials(size)
    packed = random_packed(size)
    calls: list[Callable[[], Any]] = [
        lambda: taskloom.unpack_mask(taskloom.pack_mask(values > 0), (size,)),
        lambda: taskloom.masked_restore(taskloom.masked_compress(values, packed), packed, torch.zeros(size)),
        lambda: taskloom.magnitude_mask(values, density=0.37, gamma=0.1, packed=True),
        lambda: taskloom.mask_count([packed, packed], size, 1)[0],
        lambda: taskloom.sparse_merge(None, [values, values * 2], select="dropout", density=0.5, seed=3),
    ]
    for call in calls:
        assert_same_bits(_without_nan(call()), _without_nan(_on("native", call)))


def _without_nan(values: Tensor) -> Tensor:
    return values.nan_to_num(7.5) if values.is_floating_point() else values


def test_more_ranks_than_one_and_a_threshold_that_keeps_more_than_there_are() -> None:
    values = normal(301).round()
    cut = taskloom.MagnitudeThreshold(torch.tensor(1.0), torch.tensor(1000))
    assert taskloom.magnitude_mask(values, threshold=cut).equal(values.abs() >= 1)
    found = taskloom.magnitude_threshold(values, rank=[0, 5, 5, 301])
    assert torch.stack([found.threshold, found.equal_kept]).isnan().equal(torch.tensor([[True, False, False, False], [False] * 4]))
    assert found.equal_kept.equal(_on("reference", lambda: taskloom.magnitude_threshold(values, rank=[0, 5, 5, 301])).equal_kept)


def test_merge_into_its_own_inputs() -> None:
    base, tuned = checkpoints(37, 29, dtype=torch.bfloat16)
    expected = _on("native", lambda: taskloom.sparse_merge(base, tuned, **TIES))
    for place in range(3):
        copies = [base.clone(), *(task.clone() for task in tuned)]
        out = copies[place]
        assert taskloom.sparse_merge(copies[0], copies[1:], **TIES, out=out) is out
        assert_same_bits(out, expected)


def test_merge_into_shifted_memory() -> None:
    memory = normal(1100)
    base, out = memory[:1001], memory[50:1051]
    tuned = [normal(1001, seed=1)]
    expected = _on("native", lambda: taskloom.sparse_merge(base, tuned))
    taskloom.sparse_merge(base, tuned, out=out)
    assert_same_bits(out, expected)


def test_update_in_place_reads_what_was_there() -> None:
    memory = weights(1100)
    packed = random_packed(1001)
    expected = _on("native", lambda: taskloom.masked_update(memory[50:1051], packed, memory[:1001], 0.5))
    taskloom.masked_update_(memory[50:1051], packed, memory[:1001], 0.5)
    assert_same_bits(memory[50:1051], expected)


def test_update_in_place_leaves_other_entries_alone() -> None:
    grid = weights(8, 24)
    before = grid.clone()
    mask = torch.rand(8, 12, generator=torch.Generator().manual_seed(1)) < 0.5
    taskloom.masked_update_(grid[:, ::2], mask, torch.ones(8, 12))
    assert_same_bits(grid[:, 1::2], before[:, 1::2])
    assert_same_bits(grid[:, ::2], torch.where(mask, before[:, ::2] + 1, before[:, ::2]))


def test_the_same_bits_again() -> None:
    base, tuned = checkpoints(300)
    settings = {"select": "dropout", "density": 0.3, "rescale": "l1", "elect": "sign_sum", "zero_sign": "majority"}
    first, second = (taskloom.sparse_merge(base, tuned, **settings) for _ in range(2))
    assert_same_bits(first, second)


@pytest.fixture
def far_programs(monkeypatch: pytest.MonkeyPatch) -> int:
    """Grids start at entry 2^32 with programs of 1024 entries; memory before it is reserved and never touched."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    first, block = 1 << 32, 1024
    builder = interpreter.interpreter_builder
    index, dim = builder.set_grid_idx, builder.set_grid_dim
    monkeypatch.setattr(builder, "set_grid_idx", lambda x, y, z: index(x + first // block, y, z))
    monkeypatch.setattr(builder, "set_grid_dim", lambda x, y, z: dim(x + first // block, y, z))
    return first


def test_indices_beyond_32_bits(far_programs: int) -> None:
    count = 3000
    numel = far_programs + count
    flags = torch.rand(count, generator=torch.Generator().manual_seed(1)) < 0.3
    mask = torch.empty(numel, dtype=torch.bool)
    mask[-count:] = flags
    packed = torch.empty(numel // 8, dtype=torch.uint8)
    launch(pack_mask_kernel, (3,), mask.view(torch.uint8), packed, numel, BLOCK=1024)
    assert packed[-count // 8 :].equal(_on("native", lambda: taskloom.pack_mask(flags)))
    mask[-count:] = False
    launch(unpack_mask_kernel, (3,), packed, mask.view(torch.uint8), numel, BLOCK=1024)
    assert mask[-count:].equal(flags)
    target, delta = (torch.empty(numel, dtype=torch.float16) for _ in range(2))
    target[-count:], delta[-count:] = 1, 2
    constants = {"PACKED": True, "SAME": True, "WIDE": False, "BLOCK": 1024}
    launch(masked_update_kernel, (3,), target, packed, delta, torch.ones(1), target, numel, **constants)
    assert target[-count:].equal(torch.where(flags, 3.0, 1.0).half())


def test_random_words_beyond_32_bits(far_programs: int) -> None:
    numel = far_programs + 1024
    tuned, out = torch.empty(numel, dtype=torch.float16), torch.empty(numel, dtype=torch.float16)
    tuned[-1024:] = 1
    words = torch.tensor([[tuned.data_ptr(), 0, 11, 5, 1 << 31]])
    nothing = torch.zeros(1, dtype=torch.int64)
    arguments = (tuned, tuned, words, torch.tensor([[1.0, 1.0, 0.0]]), nothing, nothing, nothing, torch.ones(2), torch.ones(1), out)
    stages = {"SELECT": 3, "BY_ROW": False, "BY_RANK": False, "ELECT": 0, "VOTE": 0, "COMBINE": 0}
    constants = {"HAS_BASE": False, "SAME": False, "WIDE": False, "ALIGNED": False, "BLOCK": 1024}
    launch(sparse_merge_kernel, (1,), *arguments, numel, numel, 1, 0, **stages, **constants)
    blocks = torch.arange(far_programs // 4, far_programs // 4 + 256)
    assert out[-1024:].equal((philox_blocks(5, 11, blocks).reshape(-1) < 1 << 31).half())


def _differentiable() -> list[Any]:
    packed = random_packed(77)
    words = torch.arange(7)
    return [
        pytest.param(lambda a, b: taskloom.weighted_ce(a.reshape(7, 11), b.reshape(7, 11), words, words > 2), id="weighted_ce"),
        pytest.param(lambda a, b: taskloom.weighted_ce((a * b).reshape(7, 11), None, words), id="weighted_ce of logits"),
        pytest.param(lambda a, b: taskloom.masked_update(a, packed, b, 0.7), id="masked_update"),
        pytest.param(lambda a, b: taskloom.masked_restore(taskloom.masked_compress(a, packed), packed, b), id="masked_restore"),
        pytest.param(lambda a, b: taskloom.multi_task_vector(a, [b, a * 2], 0.3), id="multi_task_vector"),
        pytest.param(lambda a, b: taskloom.block_scale_merge(a, [b], b[:1]), id="block_scale_merge"),
    ]


@pytest.mark.parametrize("function", _differentiable())
def test_gradients_run_on_triton_and_agree(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    leaves = [weights(77, seed=seed).requires_grad_() for seed in (0, 1)]
    with Recorder(("taskloom", "taskloom_triton")) as recorder:
        ours = torch.autograd.grad(function(*leaves).square().sum(), leaves)
    assert {op.namespace for op, _, _ in recorder.calls} == {"taskloom_triton"}
    theirs = _on("native", lambda: torch.autograd.grad(function(*leaves).square().sum(), leaves))
    for got, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_the_merge_has_no_gradient_and_says_so() -> None:
    base, tuned = checkpoints(9)
    merged = taskloom.sparse_merge(base.requires_grad_(), tuned)
    with pytest.raises(RuntimeError, match="sparse_merge has no gradient"):
        merged.sum().backward()


def test_a_compiled_function_holds_the_twin_in_one_graph() -> None:
    graphs: list[list[str]] = []

    def record(module: torch.fx.GraphModule, _inputs: Any) -> Any:
        graphs.append([str(node.target) for node in module.graph.nodes if node.op == "call_function"])
        return module.forward

    function = torch.compile(taskloom.masked_update, backend=record, fullgraph=True)
    target, packed, delta = weights(99), random_packed(99), weights(99, seed=1)
    for name in ("triton", "native", "triton"):
        with taskloom.backend(name):
            assert_same_bits(function(target, packed, delta), taskloom.masked_update(target, packed, delta))
    assert graphs == [["taskloom_triton.masked_update.default"], ["taskloom.masked_update.default"]]


def test_a_compiled_function_has_gradients() -> None:
    torch.compiler.reset()
    packed = random_packed(99)
    function = torch.compile(lambda a, b: taskloom.masked_update(a, packed, b, 0.5), backend="aot_eager", fullgraph=True, dynamic=True)
    leaves = [weights(99, seed=seed).requires_grad_() for seed in (0, 1)]
    compiled = torch.autograd.grad(function(*leaves).square().sum(), leaves)
    eager = torch.autograd.grad(taskloom.masked_update(leaves[0], packed, leaves[1], 0.5).square().sum(), leaves)
    for got, expected in zip(compiled, eager, strict=True):
        assert_same_bits(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_logits_are_taken_in_pieces(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = importlib.import_module("taskloom.triton_kernels.masked.weighted_ce")
    monkeypatch.setattr(launcher, "PIECE_ROWS", 16)
    monkeypatch.setattr(launcher, "PIECE_BYTES", 1)
    monkeypatch.setattr(launcher, "_blocks", lambda *sizes: {"BLOCK_ROWS": 16, "BLOCK_COLUMNS": 64, "BLOCK_WIDTH": 16})
    monkeypatch.setattr(launcher, "BUSY", 4)
    monkeypatch.setattr(launcher, "INTERPRETED", dtype != torch.float32)
    hidden, head = normal(40, 19, dtype=dtype), normal(530, 19, seed=1, dtype=dtype)
    targets, mask = torch.arange(40) * 13, torch.arange(40) % 5 > 0

    def gradients() -> list[Tensor]:
        leaves = [hidden.clone().requires_grad_(), head.clone().requires_grad_()]
        loss, log_probs = taskloom.weighted_ce(*leaves, targets, mask, return_log_probs=True)
        return [loss.detach(), log_probs.detach(), *torch.autograd.grad(loss + log_probs.square().mean(), leaves)]

    for ours, theirs in zip(gradients(), _on("native", gradients), strict=True):
        assert_close(ours, theirs)


def test_errors_are_those_of_the_native_ops() -> None:
    for changes, message in (
        ({"weights": torch.zeros(3)}, "weights: there is no supervised token"),
        ({"weights": torch.tensor([1, 0, -2.0])}, "weights: expected finite values of at least 0, got -2.0 at row 2"),
        ({"targets": torch.tensor([0, 9, 1])}, "targets: expected 0 to 3, got 9 at row 1"),
    ):
        given = {"hidden": torch.ones(3, 2), "weight": torch.ones(4, 2), "targets": torch.zeros(3, dtype=torch.int64)} | changes
        with pytest.raises(ValueError, match=f"weighted_ce: {message}"):
            taskloom.weighted_ce(**given)
    with pytest.raises(ValueError, match="masked_restore: compressed: expected 0 elements, one for each set entry, got 3"):
        taskloom.masked_restore(torch.ones(3), torch.zeros(2, dtype=torch.uint8), torch.ones(9))
    groups = torch.tensor([0, 3, 1], dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"block_scale_merge: partition\[0\]: expected values below 2, the number of groups, got 3"):
        taskloom.block_scale_merge(torch.ones(3), [torch.ones(3)], torch.ones(1, 1, 2), groups)


def test_indices_out_of_range() -> None:
    with pytest.raises(ValueError, match="expert_sort: ids: expected 0 to 4, the number of an expert, got 5 at entry 1"):
        taskloom.expert_sort(torch.tensor([[0, 5]]), 5)
    with pytest.raises(ValueError, match="expert_combine: inverse: expected 0 to 1, a row of y, got 2 at entry 1"):
        taskloom.expert_combine(torch.ones(2, 3), torch.ones(1, 2), torch.tensor([[0, 2]]))
    combined = taskloom.expert_combine(torch.ones(2, 3, requires_grad=True), torch.ones(1, 2), torch.tensor([[0, 0]]))
    with pytest.raises(ValueError, match="expert_combine_backward: inverse: expected each row of y once, got 0 again at entry 1"):
        combined.sum().backward()
    with pytest.raises(ValueError, match=r"manifold_loss: ids: expected -1 to 3, .*, got 4 at entry 0"):
        taskloom.manifold_loss(torch.ones(1, 3), torch.ones(4, 3), torch.tensor([[4]]), torch.ones(1, 1))


def test_automatic_choice_on_the_cpu_stays_native() -> None:
    with taskloom.backend("auto"):
        shown = taskloom.explain("sparse_merge", device="cpu")
    assert (shown.chosen, shown.obstacles["triton"]) == ("native", None)


def test_rows_that_are_sorted_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = importlib.import_module("taskloom.triton_kernels.masked.sparse_merge")
    base, tuned = checkpoints(7, 50)
    settings: dict[str, Any] = {"select": "rank_dropout", "density": 0.5, "epsilon": 0.3, "seed": 4}
    expected = _on("native", lambda: taskloom.sparse_merge(base, tuned, **settings))
    for entries in (1, 120, 200):
        monkeypatch.setattr(launcher, "RANKED_ENTRIES", entries)
        assert _on("triton", lambda: taskloom.sparse_merge(base, tuned, **settings)).equal(expected)
