"""Fused attention on TPUs, for sequences of which one head's scores fit into the memory on the chip (VMEM).

The kernels read queries, keys and values in the layout of their projections, `[b, n, H * d]`, and hold the scores
`[s, t]` of one head at a time. Nothing of the size of the scores goes to main memory. The forward pass stores the log
of each query's sum of exponentials; the backward pass computes the weights again from it. The sums of the gradients
over positions, which biases need, come out of the same kernel.

Two properties of a TPU shape the kernels. Scores are held with keys along sublanes and queries along lanes: a softmax
over sublanes is element-wise work. A vector has 128 lanes: narrower heads are worked on in groups that fill them, with
the lanes of the other heads zeroed in one operand of each product. The matrix unit multiplies 128 lanes in any case.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec

from clip_jax.models.common import BATCH_AXES
from clip_jax.models.layers import add

#: Lanes of a vector: the multiple to which queries are padded in VMEM.
LANES = 128
#: The multiple to which keys are padded in VMEM: rows of bfloat16 in a register.
ROWS = 16
#: Bytes of VMEM that a kernel may take. Each core of a v4 has 16 MiB, the least of the supported chips.
VMEM = 15 * 2**20
#: Added to the scores of pairs that do not attend.
HIDDEN = -1e30


class _Plan(NamedTuple):
    """What the kernels are made for: the width of a head, and whether attention is causal."""

    width: int
    causal: bool


def fits(b, t, s, heads, width, mask=None):
    """Returns whether `attention` takes b examples of t queries and s keys with these heads and this mask.

    It takes more than one query, examples that the mesh in use divides, scores that fit into VMEM, and no mask or one
    of keys alone, `[b or 1, 1, 1, s]`.
    """
    spec = _split(b, heads)
    if t == 1 or spec is None or not (mask is None or mask.shape[1:3] == (1, 1)):
        return False
    here = heads // _devices(spec[2])
    return _Call(_Plan(width, False), t, s, here * width).examples(1) > 0


def _devices(axes):
    """The number of devices into which mesh axes split a dimension."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape.get(axis, 1) for axis in ([axes] if isinstance(axes, str) else axes or ()))


def _split(b, heads):
    """Returns how the mesh in use splits `[b, n, H * d]`; None where it does not divide the examples."""
    if b % _devices(BATCH_AXES):
        return None
    return PartitionSpec(BATCH_AXES, None, "tensor" if heads % _devices("tensor") == 0 else None)


def attention(q, k, v, biases, heads, mask=None, causal=False):
    """Returns the softmax attention of `q + biases[0]` to `k + biases[1]` and `v + biases[2]`, `[b, t, H * d]`.

    It is differentiable once, in reverse mode. A query without keys gets the mean of the values, and no gradient.

    Args:
      q: queries `[b, t, H * d]`, bfloat16; float32 also works.
      k, v: keys and values `[b, s, H * d]`.
      biases: three float32 arrays `[H * d]`. None adds nothing.
      heads: number of heads H.
      mask: bool `[b, s]`, True at the keys that are attended to. None allows all.
      causal: allows attention to the same and earlier positions only; needs t = s.
    """
    return _attention(_Plan(q.shape[-1] // heads, causal), q, k, v, biases, mask)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(plan, q, k, v, biases, mask):
    return _forward(plan, q, k, v, biases, mask)[0]


def _forward(plan, q, k, v, biases, mask):
    q, k, v = (x if bias is None else add(x, bias) for x, bias in zip((q, k, v), biases, strict=True))
    mask = None if mask is None else mask.astype(jnp.float32)[:, None]
    out, lse = _on_devices(_run_forward, plan, "qkkm", "ql", q, k, v, mask)
    return out, (q, k, v, biases, mask, lse)


def _backward(plan, residuals, d_out):
    q, k, v, biases, mask, lse = residuals
    *grads, sums = _on_devices(_run_backward, plan, "qkkmlq", "qkkb", q, k, v, mask, lse, d_out)
    d_biases = tuple(None if bias is None else sums[:, i].sum(0) for i, bias in enumerate(biases))
    return *grads, d_biases, None


_attention.defvjp(_forward, _backward)


def _on_devices(run, plan, inputs, outputs, q, *more):
    """Runs a kernel on each device of the mesh in use, with the device's examples and heads.

    `inputs` and `outputs` have one letter for each array: q and k for `[b, n, H * d]`, b for `[b, 3, H * d]`, l for
    `[b, blocks of heads, heads of a block, t]` and m for `[b, 1, s]`.
    """
    run = functools.partial(run, plan)
    if jax.sharding.get_abstract_mesh().empty:
        return run(q, *more)
    whole = _split(len(q), q.shape[-1] // plan.width)
    specs = {"q": whole, "k": whole, "b": whole, "l": PartitionSpec(whole[0], whole[2]), "m": PartitionSpec(whole[0])}
    inputs, outputs = (tuple(specs[letter] for letter in letters) for letters in (inputs, outputs))
    return jax.shard_map(run, in_specs=inputs, out_specs=outputs, check_vma=False)(q, *more)


def _run_forward(plan, q, k, v, mask):
    """Returns the output and the log2 of each query's sum of exponentials, float32 `[b, blocks, heads, t]`."""
    b, t, width = q.shape
    call = _Call(plan, t, k.shape[1], width)
    lse = jax.ShapeDtypeStruct((b, width // call.columns, call.columns // plan.width, t), jnp.float32)
    return call(_forward_kernel, "attention_forward", 2, "qkkm", "ql", (q, k, v, mask), (q, lse))


def _run_backward(plan, q, k, v, mask, lse, d_out):
    """Returns the gradients of q, k and v, and their sums over positions, float32 `[b, 3, H * d]`."""
    b, t, width = q.shape
    sums, call = jax.ShapeDtypeStruct((b, 3, width), jnp.float32), _Call(plan, t, k.shape[1], width)
    return call(
        _backward_kernel, "attention_backward", 5, "qkkmlq", "qkkb", (q, k, v, mask, lse, d_out), (q, k, v, sums)
    )


class _Call(NamedTuple):
    """A kernel's call for t queries, s keys and heads of together `width`."""

    plan: _Plan
    t: int
    s: int
    width: int

    @property
    def columns(self):
        """The columns of a block: the fewest heads that fill whole vectors, or all."""
        columns = math.lcm(self.plan.width, LANES)
        return columns if self.width % columns == 0 else self.width

    @property
    def padded(self):
        """The numbers of queries and keys in VMEM."""
        return _up(self.t, LANES), _up(self.s, ROWS)

    def examples(self, b):
        """Returns the number of examples in a step of a kernel, a divisor of b; 0 if one does not fit into VMEM."""
        t, s = self.padded
        # The backward pass: queries, their gradient and that of the output; keys, values and their gradients; all
        # twice, as the next step's are loaded meanwhile. Scores, weights and their gradients in float32.
        block, scores = 2 * 2 * (3 * t + 4 * s) * _up(self.columns, LANES), 8 * 4 * s * t
        most = (VMEM - scores) // block
        return next((n for n in range(min(b, max(most, 0)), 0, -1) if b % n == 0), 0)

    def __call__(self, kernel, name, products, inputs, outputs, arrays, results):
        """Returns the results of a kernel, which works on a block of heads of a few examples in each step of its grid.

        Args:
          kernel: gets references to the blocks of `arrays`, without None, and of `results`.
          name: the kernel's name in the program.
          products: the number of its matrix products for a head.
          inputs, outputs: letters as in `_on_devices`.
          arrays, results: the arrays, of which some may be None; shapes and dtypes of the results.
        """
        (t, s), c = self.padded, self.columns
        blocks = {"q": (t, c), "k": (s, c), "b": (3, c), "l": (None, c // self.plan.width, t), "m": (1, _up(s, LANES))}
        inputs = "".join(letter for letter, x in zip(inputs, arrays, strict=True) if x is not None)
        arrays = [x for x in arrays if x is not None]
        b = len(arrays[0])
        n = self.examples(b)

        def specs(letters):
            at = {"l": lambda i, j: (i, j, 0, 0), "m": lambda i, j: (i, 0, 0)}
            return [pl.BlockSpec((n, *blocks[x]), at.get(x, lambda i, j: (i, 0, j))) for x in letters]

        pairs = b * (self.width // self.plan.width) * self.t * self.s
        moved = sum(math.prod(x.shape) * x.dtype.itemsize for x in (*arrays, *results))
        return pl.pallas_call(
            functools.partial(kernel, call=self),
            grid=(b // n, self.width // c),
            in_specs=specs(inputs),
            out_specs=specs(outputs),
            out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in results],
            cost_estimate=pl.CostEstimate(
                flops=2 * products * pairs * self.plan.width, transcendentals=pairs, bytes_accessed=moved
            ),
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 2, vmem_limit_bytes=VMEM),
            name=name,
        )(*arrays)

    def tiles(self):
        """The rows of the queries that are worked on together."""
        return [slice(first, first + LANES) for first in range(0, self.padded[0], LANES)]

    def groups(self):
        """Yields the columns of the heads in a block that are worked on together, and a list of these heads.

        The list has the number of each head in the block, with the first and the last of its columns in the group.
        """
        d = self.plan.width
        size = LANES // d if LANES % d == 0 and self.columns % LANES == 0 else 1
        for head in range(0, self.columns // d, size):
            yield slice(head * d, (head + size) * d), [(head + h, (h * d, (h + 1) * d)) for h in range(size)]


def _forward_kernel(q_ref, k_ref, v_ref, *refs, call):
    *mask_ref, out_ref, lse_ref = refs

    def example(i, carry):
        column = _column(call, mask_ref, i)
        for columns, heads in call.groups():
            keys = [_keep(k_ref[i, :, columns], call.s, lanes) for _, lanes in heads]
            values = [_keep(v_ref[i, :, columns], call.s, lanes) for _, lanes in heads]
            for rows in call.tiles():
                q, out = q_ref[i, rows, columns], 0.0
                for (head, _), k, v in zip(heads, keys, values, strict=True):
                    scores = _scores(call, k, q, column, rows)
                    largest = jnp.max(scores, axis=0, keepdims=True)
                    weights = jnp.exp2(scores - largest)
                    total = jnp.sum(weights, axis=0, keepdims=True)
                    out += _dot((weights * (1.0 / total)).astype(v.dtype), v, 0, 0)
                    lse = jnp.where(largest > HIDDEN / 2, largest + jnp.log2(total), -HIDDEN)
                    lse_ref[i, head : head + 1, rows] = lse
                out_ref[i, rows, columns] = out.astype(out_ref.dtype)
        return carry

    jax.lax.fori_loop(0, len(q_ref), example, 0)


def _backward_kernel(q_ref, k_ref, v_ref, *refs, call):
    *mask_ref, lse_ref, d_out_ref, d_q_ref, d_k_ref, d_v_ref, sums_ref = refs
    factor = call.plan.width**-0.5

    def example(i, carry):
        column = _column(call, mask_ref, i)
        for columns, heads in call.groups():
            k, v = k_ref[i, :, columns], _keep(v_ref[i, :, columns], call.s)
            keys = [_keep(k, call.s, lanes) for _, lanes in heads]
            d_k = d_v = sums = 0.0
            for rows in call.tiles():
                q, d_out = (_keep(ref[i, rows, columns], call.t - rows.start) for ref in (q_ref, d_out_ref))
                d_q = 0.0
                for (head, lanes), k in zip(heads, keys, strict=True):
                    lse = lse_ref[i, head : head + 1, rows]
                    if rows.stop > call.t:  # what is behind the last query may be no number
                        lse = jnp.where(_iota(lse.shape, 1) < call.t - rows.start, lse, -HIDDEN)
                    weights = jnp.exp2(_scores(call, k, q, column, rows) - lse)
                    d_out_h = _keep(d_out, LANES, lanes)
                    d_weights = _dot(v, d_out_h, 1, 1)
                    mean = jnp.sum(weights * d_weights, axis=0, keepdims=True)
                    d_scores = (weights * (d_weights - mean)).astype(q.dtype)
                    d_q += _dot(d_scores, k, 0, 0)
                    d_k += _dot(d_scores, _keep(q, LANES, lanes), 1, 0)
                    d_v += _dot(weights.astype(q.dtype), d_out_h, 1, 0)
                d_q *= factor
                d_q_ref[i, rows, columns] = d_q.astype(d_q_ref.dtype)
                sums += jnp.sum(d_q, axis=0, keepdims=True)
            d_k *= factor
            d_k_ref[i, :, columns], d_v_ref[i, :, columns] = d_k.astype(d_k_ref.dtype), d_v.astype(d_v_ref.dtype)
            sums_ref[i, 0:1, columns] = sums
            sums_ref[i, 1:2, columns] = jnp.sum(d_k, axis=0, keepdims=True)
            sums_ref[i, 2:3, columns] = jnp.sum(d_v, axis=0, keepdims=True)
        return carry

    jax.lax.fori_loop(0, len(q_ref), example, 0)


def _dot(x, y, x_axis, y_axis):
    return jax.lax.dot_general(x, y, (((x_axis,), (y_axis,)), ((), ())), preferred_element_type=jnp.float32)


def _iota(shape, axis):
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def _scores(call, k, q, column, rows):
    """Returns the scores of the queries of `rows`, as powers of 2, `[s, rows]`; hidden ones are very small."""
    scores = _dot(k, q, 1, 1) * (call.plan.width**-0.5 * math.log2(math.e))
    if call.plan.causal:
        hidden = _iota(scores.shape, 0) > rows.start + _iota(scores.shape, 1)
        scores = scores + jnp.where(hidden, 2 * HIDDEN, 0.0)
    return scores if column is None else scores + column


def _column(call, mask_ref, i):
    """Returns what is added to the scores of the keys of an example, float32 `[s, 1]`, or None."""
    rows, column = call.padded[1], None
    if rows != call.s and not call.plan.causal:  # a causal mask hides the rows behind the last key from all queries
        column = jnp.where(_iota((rows, 1), 0) < call.s, 0.0, 2 * HIDDEN)
    if mask_ref:
        # A row of lanes becomes a column. What is behind the last key may be no number.
        row = jnp.where(mask_ref[0][i] == 1.0, 0.0, HIDDEN)
        hidden = jnp.broadcast_to(row, (LANES, row.shape[1])).T[:rows, :1]
        column = hidden if column is None else hidden + column
    return column


def _keep(x, n, lanes=None):
    """Returns `x[rows, w]` with zeros behind its first n rows, also for what is no number, and outside of `lanes`."""
    if len(x) <= n and (lanes is None or lanes == (0, x.shape[1])):
        return x
    # The zeros are set in words of 32 bits, which hold two rows of bfloat16, the first one in the lower half.
    words = pltpu.bitcast(x, jnp.int32)
    per = len(x) // len(words)
    keep = -1
    if len(x) > n:
        row = per * _iota(words.shape, 0)
        keep = jnp.where(row + per - 1 < n, -1, jnp.where(row < n, 0xFFFF, 0))
    if lanes is not None:
        lane = _iota(words.shape, 1)
        keep = jnp.where((lane >= lanes[0]) & (lane < lanes[1]), keep, 0)
    return pltpu.bitcast(words & keep, x.dtype)


def _up(n, multiple):
    return -(-n // multiple) * multiple
