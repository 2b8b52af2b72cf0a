"""torch.where and the Triton kernel write, bit by bit, what plain loops write, and touch nothing else."""

import sys

import pytest
import torch

import engine.core.ops.edit
from engine.core.ops import edit_heads
from tests.conftest import quick

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
MODES = ("replace", "add", "scale")
# Values: shared by all rows or one set a row; one for all tokens or one a token.
sets = pytest.mark.parametrize(
    ("shared", "per_token"),
    [(True, False), (False, False), (True, True), (False, True)],
    ids=["shared", "own", "shared by token", "own by token"],
)


def numbers(*shape, dtype, random, factors=False):
    """Sixteenths, whose sums are exact in bfloat16 too: Triton's interpreter truncates to it. On a GPU any number.

    factors: such that products with these are exact, too.
    """
    if DEVICE == "cpu" and factors:
        few = torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.25, 0.5, 1.0, 2.0])
        return few[torch.randint(len(few), shape, generator=random)].to(dtype)
    if DEVICE == "cpu":
        return (torch.randint(-127, 128, shape, generator=random) / 16).to(dtype)
    return torch.randn(shape, generator=random).to(DEVICE, dtype)


def same(got, want):
    """Bit by bit: of NaN, too."""
    return torch.equal(got.contiguous().view(BITS[got.dtype]), want.contiguous().view(BITS[want.dtype]))


def draw(rows, tokens, heads, head_dim, dtype, shared, random, mode="replace", per_token=False):
    """z, mask and values, with NaN in every head of z and of values that is not to be touched.

    per_token: values have an axis for tokens.
    """
    mask = (torch.rand(rows, heads, generator=random) < 0.4).to(DEVICE)
    z = numbers(rows, tokens, heads, head_dim, dtype=dtype, random=random)
    lead = (1 if shared else rows, tokens if per_token else 1)
    values = numbers(*lead, heads, head_dim, dtype=dtype, random=random, factors=mode == "scale")
    z[~mask[:, None].expand(-1, tokens, -1)] = torch.nan
    on = mask.any(dim=0, keepdim=True) if shared else mask
    values[~on[:, None].expand(-1, values.shape[1], -1)] = torch.nan
    return z, mask, values if per_token else values[:, 0]


@both
@pytest.mark.parametrize("head_dim", quick(HEAD_DIMS, 1, 80, 128))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shared", [True, False])
def test_equals_the_loops(random, impl, head_dim, dtype, mode, shared):
    three = SIZES[HEAD_DIMS.index(head_dim) % 3]
    by_token = [(*sizes, True) for sizes in three if sizes[1] == 5]
    for *sizes, per_token in [*((*sizes, False) for sizes in three), *by_token]:
        z, mask, values = draw(*sizes, head_dim, dtype, shared, random, mode, per_token)
        want = edit_heads(z.clone(), mask, values, mode, "reference")
        got = edit_heads(z, mask, values, mode, impl)
        assert got is z
        assert same(got, want), (sizes, per_token)


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
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(random, impl, layout, mode, dtype):
    """A view: what it shows is edited, what lies around it is not; mask and values have strides of their own."""
    for per_token in (False, True):
        any_strides(random, impl, layout, mode, dtype, per_token)


def any_strides(random, impl, layout, mode, dtype, per_token):
    z, mask, values = draw(3, 2, 9, 12, dtype, False, random, mode, per_token)
    want, around = layout(edit_heads(z.clone(), mask, values, mode, "reference"))
    view, whole = layout(z)
    mask = mask.T.contiguous().T
    values = values.movedim(-1, 0).contiguous().movedim(0, -1)
    values = values.transpose(0, 1).contiguous().transpose(0, 1)
    assert edit_heads(view, mask, values, mode, impl) is view
    assert same(view, want)
    assert same(whole, around)


@both
def test_values_and_masks_that_are_expanded(random, impl):
    z = numbers(5, 1, 9, 12, dtype=torch.float32, random=random)
    mask = torch.tensor([True, False, True] * 3, device=DEVICE).expand(5, 9)
    values = numbers(9, 12, dtype=torch.float32, random=random).expand(5, 9, 12)
    want = edit_heads(z.clone(), mask, values, "replace", "reference")
    for one in (values, values[:, None], values[:1, None]):
        assert torch.equal(edit_heads(z.clone(), mask, one, "replace", impl), want)


@both
@pytest.mark.parametrize("mode", MODES)
def test_one_set_is_the_same_a_token(random, impl, mode):
    """Values without an axis for tokens, with one of one, and spread over all tokens."""
    z, mask, values = draw(3, 5, 9, 12, torch.float32, False, random, mode)
    want = edit_heads(z.clone(), mask, values, mode, "reference")
    for one in (values, values[:, None], values[:, None].expand(-1, 5, -1, -1), values[:, None].repeat(1, 5, 1, 1)):
        assert same(edit_heads(z.clone(), mask, one, mode, impl), want)


@both
def test_scaled_by_zero(random, impl):
    """Ablated: zeros where the mask is, in every head of every token."""
    z, mask, values = draw(3, 5, 9, 12, torch.float32, True, random)
    got = edit_heads(z.clone(), mask, torch.zeros_like(values), "scale", impl)
    on = mask[:, None].expand(-1, 5, -1)
    assert not got[on].any()
    assert got[~on].isnan().all()


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
        (shared, "scale", [0, 1, 20, 3, 4, 100, 6, 140]),
        (own, "scale", [0, 1, 20, 3, 4, 200, 6, 280]),
        (torch.stack([shared, own[1:]], dim=1), "replace", [10, 1, 30, 3, 4, 20, 6, 40]),
        (torch.stack([own, -own], dim=1), "add", [10, 1, -8, 3, 4, 45, 6, -33]),
        (torch.stack([own, -own], dim=1), "scale", [0, 1, -20, 3, 4, 200, 6, -280]),
    ]:
        assert edit_heads(z.clone(), mask, values, mode, "reference").flatten().tolist() == want


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_sum_and_product_are_rounded_to_the_dtype_of_z(random, dtype):
    """As naive adds: what a float64 sum rounds to (no sum of two shorter numbers is rounded twice on the way)."""
    z, values = (torch.randn(4, 1, 9, 64, generator=random).to(dtype) for _ in range(2))
    mask = torch.ones(4, 9, dtype=torch.bool)
    wanted = {"add": (z.double() + values.double()).to(dtype), "scale": (z.double() * values.double()).to(dtype)}
    for mode, want in wanted.items():
        for impl in ("reference", "torch"):
            assert torch.equal(edit_heads(z.clone(), mask, values[:, 0], mode, impl), want)


@INTERPRETER
@pytest.mark.parametrize("mode", MODES)
@sets
def test_the_kernel_reads_nothing_it_does_not_change(triton_edit, random, monkeypatch, mode, shared, per_token):
    """Every address that is loaded or stored: the mask; values of heads that are on; z of those, unless replaced."""
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

    z, mask, values = draw(3, 2, 9, 12, torch.float32, shared, random, mode, per_token)
    edit_heads(z, mask, values, mode, "triton")
    changed = addresses(z, mask[:, None].expand(-1, 2, -1))
    on = mask.any(dim=0, keepdim=True) if shared else mask
    used = addresses(values, on[:, None].expand(-1, 2, -1) if per_token else on)
    assert stored == changed
    assert loaded == addresses(mask, ...) | used | (set() if mode == "replace" else changed)


@pytest.mark.parametrize(("capability", "dtype"), [(80, "bf16"), (90, "bf16"), (90, "fp16"), (90, "fp32")])
@pytest.mark.parametrize("mode", MODES)
def test_the_kernel_compiles_for_gpus(unimported, monkeypatch, tmp_path, capability, dtype, mode):
    """Without one at hand: down to machine code, in which one load, the mask's, stands before the first branch."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    from engine.core.ops import triton_edit

    constants = {"ADD": mode == "add", "SCALE": mode == "scale", "BLOCK_T": 2, "BLOCK_D": 128}
    types = {name: "i32" for name in triton_edit._edit_heads.arg_names}
    types |= {"z": f"*{dtype}", "mask": "*i1", "values": f"*{dtype}", **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(triton_edit._edit_heads, types, constants)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 1}).asm
    assert made["cubin"]
    before, after = made["ptx"].split("bra", 1)
    assert before.count("ld.global") == 1
    assert "ld.global" in after
    assert made["ttir"].count("tt.load") == (2 if mode == "replace" else 3)


@pytest.mark.parametrize("impl", ["auto", "torch", "reference"])
@pytest.mark.parametrize("mode", MODES)
@sets
def test_gradients(random, impl, mode, shared, per_token):
    """Where they are recorded z is left alone, and the result is differentiable in z and values."""
    lead = (1 if shared else 3, *[2][: int(per_token)])
    z, values = torch.randn(3, 2, 4, 5, generator=random).double(), torch.randn(*lead, 4, 5).double()
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
    on = mask[:, None].expand(-1, 2, -1)
    for mode in MODES:
        leaf = values.clone().requires_grad_()
        edit_heads(z.clone(), mask, leaf, mode)[on].sum().backward()
        per_token = z if mode == "scale" else torch.ones_like(z)
        want = torch.where(on[..., None], per_token, 0).sum(dim=1)
        torch.testing.assert_close(leaf.grad, want, rtol=1e-6, atol=1e-6)


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
