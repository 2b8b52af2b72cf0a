"""torch.where and the Triton kernel write, bit by bit, what plain loops write, and touch nothing else."""

import sys

import pytest
import torch

import engine.core.ops.edit
from engine.core.ops import edit_heads

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
INTERPRETER = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's loads are counted; this is a GPU")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BITS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}
HEAD_DIMS = (1, 12, 64, 80, 96, 128, 256)
# Rows, tokens, heads: in each triple all of 1, 3, 33; 1, 2, 5; 1, 9, 14; in all of them each with each.
SIZES = [
    [(1, 1, 1), (3, 2, 14), (33, 5, 9)],
    [(1, 2, 9), (3, 5, 1), (33, 1, 14)],
    [(1, 5, 14), (3, 1, 9), (33, 2, 1)],
]
both = pytest.mark.parametrize("impl", ["torch", "triton"], indirect=True)


def numbers(*shape, dtype, random):
    """Sixteenths, whose sums are exact in bfloat16 too: Triton's interpreter truncates to it. On a GPU any number."""
    if DEVICE == "cpu":
        return (torch.randint(-127, 128, shape, generator=random) / 16).to(dtype)
    return torch.randn(shape, generator=random).to(DEVICE, dtype)


def same(got, want):
    """Bit by bit: of NaN, too."""
    return torch.equal(got.contiguous().view(BITS[got.dtype]), want.contiguous().view(BITS[want.dtype]))


def draw(rows, tokens, heads, head_dim, dtype, shared, random):
    """z, mask and values, with NaN in every head of z and of values that is not to be touched."""
    mask = (torch.rand(rows, heads, generator=random) < 0.4).to(DEVICE)
    z = numbers(rows, tokens, heads, head_dim, dtype=dtype, random=random)
    values = numbers(1 if shared else rows, heads, head_dim, dtype=dtype, random=random)
    z[~mask[:, None].expand(-1, tokens, -1)] = torch.nan
    values[~(mask.any(dim=0, keepdim=True) if shared else mask)] = torch.nan
    return z, mask, values


@both
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["replace", "add"])
@pytest.mark.parametrize("shared", [True, False])
def test_equals_the_loops(random, impl, head_dim, dtype, mode, shared):
    for sizes in SIZES[HEAD_DIMS.index(head_dim) % 3]:
        z, mask, values = draw(*sizes, head_dim, dtype, shared, random)
        want = edit_heads(z.clone(), mask, values, mode, "reference")
        got = edit_heads(z, mask, values, mode, impl)
        assert got is z
        assert same(got, want), sizes


def packed(z):
    """The rows at the end of a longer sequence, as a backend hands them over; and the whole sequence."""
    rows, tokens, heads, head_dim = z.shape
    sequence = torch.full((1, 7 + rows * tokens, heads * head_dim), torch.nan, dtype=z.dtype, device=z.device)
    view = sequence[0, 7:].unflatten(0, (rows, tokens)).unflatten(-1, (heads, head_dim))
    view.copy_(z)
    return view, sequence


def last_token(z):
    whole = torch.cat([torch.full_like(z, torch.nan), z], dim=1)
    return whole[:, z.shape[1] :], whole


def transposed(z):
    """Heads first, as attention computes them; and head_dim outermost."""
    whole = z.permute(3, 2, 0, 1).contiguous()
    return whole.permute(2, 3, 1, 0), whole


def spread(z):
    """Every third number of a longer tensor: no stride is 1."""
    whole = torch.full((*z.shape[:3], 3 * z.shape[3]), torch.nan, dtype=z.dtype, device=z.device)
    whole[..., ::3] = z
    return whole[..., ::3], whole


@both
@pytest.mark.parametrize("layout", [packed, last_token, transposed, spread])
@pytest.mark.parametrize("mode", ["replace", "add"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(random, impl, layout, mode, dtype):
    """A view: what it shows is edited, what lies around it is not; mask and values have strides of their own."""
    z, mask, values = draw(3, 2, 9, 12, dtype, False, random)
    want, around = layout(edit_heads(z.clone(), mask, values, mode, "reference"))
    view, whole = layout(z)
    mask = mask.T.contiguous().T
    values = values.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert edit_heads(view, mask, values, mode, impl) is view
    assert same(view, want)
    assert same(whole, around)


@both
def test_values_and_masks_that_are_expanded(random, impl):
    z = numbers(5, 1, 9, 12, dtype=torch.float32, random=random)
    mask = torch.tensor([True, False, True] * 3, device=DEVICE).expand(5, 9)
    values = numbers(9, 12, dtype=torch.float32, random=random).expand(5, 9, 12)
    want = edit_heads(z.clone(), mask, values, "replace", "reference")
    assert torch.equal(edit_heads(z, mask, values, "replace", impl), want)


@both
def test_nothing_to_edit(impl):
    for shape in [(0, 1, 9, 12), (3, 0, 9, 12)]:
        z = torch.zeros(shape, device=DEVICE)
        mask = torch.ones(shape[0], 9, dtype=torch.bool, device=DEVICE)
        assert edit_heads(z, mask, torch.ones(1, 9, 12, device=DEVICE), "add", impl) is z


def test_the_loops_by_hand():
    z = torch.arange(8.0).view(2, 2, 2, 1)  # [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]
    mask = torch.tensor([[True, False], [False, True]])
    shared, own = torch.tensor([[[10.0], [20.0]]]), torch.tensor([[[10.0], [20.0]], [[30.0], [40.0]]])
    for values, mode, want in [
        (shared, "replace", [10, 1, 10, 3, 4, 20, 6, 20]),
        (own, "replace", [10, 1, 10, 3, 4, 40, 6, 40]),
        (shared, "add", [10, 1, 12, 3, 4, 25, 6, 27]),
        (own, "add", [10, 1, 12, 3, 4, 45, 6, 47]),
    ]:
        assert edit_heads(z.clone(), mask, values, mode, "reference").flatten().tolist() == want


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_the_sum_is_rounded_to_the_dtype_of_z(random, dtype):
    """As naive adds: what a float64 sum rounds to (no sum of two shorter numbers is rounded twice on the way)."""
    z, values = (torch.randn(4, 1, 9, 64, generator=random).to(dtype) for _ in range(2))
    mask = torch.ones(4, 9, dtype=torch.bool)
    want = (z.double() + values.double()).to(dtype)
    for impl in ("reference", "torch"):
        assert torch.equal(edit_heads(z.clone(), mask, values[:, 0], "add", impl), want)


@INTERPRETER
@pytest.mark.parametrize("mode", ["replace", "add"])
@pytest.mark.parametrize("shared", [True, False])
def test_the_kernel_reads_nothing_it_does_not_change(triton_edit, random, monkeypatch, mode, shared):
    """Every address that is loaded or stored: the mask; values of heads that are on; z of those, if added to."""
    from triton.runtime import interpreter

    loaded, stored = set(), set()
    load, store = interpreter._interpreter.load, interpreter._interpreter.store

    def recorded_load(pointers, mask, *rest):
        loaded.update(pointers[mask].tolist())
        return load(pointers, mask, *rest)

    def recorded_store(pointers, value, mask):
        stored.update(pointers[mask].tolist())
        return store(pointers, value, mask)

    monkeypatch.setattr(interpreter._interpreter, "load", recorded_load)
    monkeypatch.setattr(interpreter._interpreter, "store", recorded_store)

    def addresses(x, on):
        where = torch.arange(x.numel()).view(x.shape)[on]
        return {x.data_ptr() + i * x.element_size() for i in where.flatten().tolist()}

    z, mask, values = draw(3, 2, 9, 12, torch.float32, shared, random)
    edit_heads(z, mask, values, mode, "triton")
    changed = addresses(z, mask[:, None].expand(-1, 2, -1))
    used = addresses(values, mask.any(dim=0, keepdim=True) if shared else mask)
    assert stored == changed
    assert loaded == addresses(mask, ...) | used | (changed if mode == "add" else set())


@pytest.mark.parametrize(("capability", "dtype"), [(80, "bf16"), (90, "bf16"), (90, "fp16"), (90, "fp32")])
@pytest.mark.parametrize("mode", ["replace", "add"])
def test_the_kernel_compiles_for_gpus(unimported, monkeypatch, tmp_path, capability, dtype, mode):
    """Without one at hand: down to machine code, in which one load, the mask's, stands before the first branch."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    from engine.core.ops import triton_edit

    constants = {"ADD": mode == "add", "BLOCK_T": 2, "BLOCK_D": 128}
    types = {name: "i32" for name in triton_edit._edit_heads.arg_names}
    types |= {"z": f"*{dtype}", "mask": "*i1", "values": f"*{dtype}", **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(triton_edit._edit_heads, types, constants)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 1}).asm
    assert made["cubin"]
    before, after = made["ptx"].split("bra", 1)
    assert before.count("ld.global") == 1
    assert "ld.global" in after
    assert made["ttir"].count("tt.load") == (3 if mode == "add" else 2)


@pytest.mark.parametrize("impl", ["auto", "torch", "reference"])
@pytest.mark.parametrize("mode", ["replace", "add"])
@pytest.mark.parametrize("shared", [True, False])
def test_gradients(random, impl, mode, shared):
    """Where they are recorded z is left alone, and the result is differentiable in z and values."""
    z, values = torch.randn(3, 2, 4, 5, generator=random).double(), torch.randn(1 if shared else 3, 4, 5).double()
    mask = torch.rand(3, 4, generator=random) < 0.5
    want = edit_heads(z.clone(), mask, values, mode, "reference")
    for leaf in (z, values):
        before = z.clone()
        leaf.requires_grad_()
        got = edit_heads(z, mask, values, mode, impl)
        assert got.requires_grad
        assert torch.equal(got, want)
        assert torch.equal(z, before)
        torch.autograd.gradcheck(lambda one, z=z, leaf=leaf: edit_heads(
            one if leaf is z else z, mask, values if leaf is z else one, mode, impl), (leaf,))  # fmt: skip
        with torch.no_grad():
            held = z.clone().requires_grad_()
            assert edit_heads(held, mask, values, mode, impl) is held
        leaf.requires_grad_(False)


def test_gradients_do_not_reach_what_is_masked(random):
    """Not even as NaN."""
    z, mask, values = (x.cpu() for x in draw(3, 2, 9, 12, torch.float32, False, random))
    for mode in ("replace", "add"):
        leaf = values.clone().requires_grad_()
        edit_heads(z, mask, leaf, mode)[mask[:, None].expand(-1, 2, -1)].sum().backward()
        assert torch.equal(leaf.grad, 2.0 * mask[:, :, None].expand(3, 9, 12))


def chosen(monkeypatch, z, values=None):
    """The implementation that "auto" takes."""
    took = []
    monkeypatch.setattr("engine.core.ops.edit.fused.edit_heads", lambda *_, **__: took.append("torch") or z)
    if z.is_cuda:
        monkeypatch.setattr("engine.core.ops.triton_edit.edit_heads", lambda *_: took.append("triton") or z)
    values = torch.zeros_like(z[:1, 0]) if values is None else values
    edit_heads(z, torch.ones(z.shape[0], z.shape[2], dtype=torch.bool, device=z.device), values, "replace")
    return took[-1]


def test_auto_is_torch_on_the_cpu(monkeypatch):
    assert chosen(monkeypatch, torch.zeros(2, 1, 3, 4)) == "torch"


@CUDA
def test_auto_on_a_gpu(triton_edit, monkeypatch):
    z = torch.zeros(2, 1, 3, 4, device="cuda")
    assert engine.core.ops.edit._triton_runs(z.device)
    assert chosen(monkeypatch, z) == "triton"
    assert chosen(monkeypatch, z.half()) == "triton"
    assert chosen(monkeypatch, z.double()) == "torch"
    assert chosen(monkeypatch, z, z[:1, 0].clone().requires_grad_()) == "torch"


def test_auto_tries_triton_once(triton_edit, monkeypatch):
    """What cannot be compiled here is said, and done without."""
    tried = engine.core.ops.edit._triton_runs.__wrapped__
    assert tried(torch.device(DEVICE))

    def broken(*_):
        raise RuntimeError("no C compiler")

    monkeypatch.setattr(triton_edit, "edit_heads", broken)
    with pytest.warns(UserWarning, match="torch edits the heads instead: no C compiler"):
        assert not tried(torch.device(DEVICE))


def test_auto_without_triton(unimported, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert not engine.core.ops.edit._triton_runs.__wrapped__(torch.device("cpu"))
