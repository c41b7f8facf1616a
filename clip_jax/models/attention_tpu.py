"""Fused attention on TPUs, for sequences of which one head's scores fit into the memory on the chip (VMEM).

The kernels read queries, keys and values in the layout of their projections, `[b, n, H * d]`, and hold the scores
`[s, t]` of one head at a time. Nothing of the size of the scores goes to main memory. The forward pass stores the log
of each query's sum of exponentials; the backward pass computes the weights again from it. The sums of the gradients
over positions, which biases need, come out of the same kernel.

What a TPU does well shapes the kernels:
  Scores lie with keys along sublanes and queries along lanes. A softmax over sublanes is element-wise work.
  A vector has 128 lanes, and the matrix unit multiplies 128 lanes in any case. Narrower heads are worked on in groups
  that fill them. The scores of a head come from the group's keys with the lanes of the other heads zeroed.
  Outputs and gradients are computed with the columns of heads along sublanes, of which parts can be taken for free, and
  a group is transposed as a whole. The scores are never transposed.
  One head alone leaves the units waiting for each other: see `_for_all_heads`.
"""

import functools
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec

from clip_jax.models.common import BATCH_AXES, KEPT, devices_along
from clip_jax.models.layers import add

#: Lanes of a vector: the multiple to which queries are padded in VMEM.
LANES = 128
#: The multiple to which keys are padded in VMEM: rows of bfloat16 in a register.
ROWS = 16
#: Bytes of VMEM that a kernel may take. Each core of a v4 has 16 MiB, the least of the supported chips.
VMEM = 15 * 2**20
#: The most heads of a block.
HEADS = 8
#: The most heads, of all examples together, that are one piece of straight code.
PAIRS = 32
#: By how many heads the first products of a head are ahead of its softmax.
AHEAD = 4
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
    here = heads // devices_along(spec[2])
    return _Call(_Plan(width, False), t, s, here * width).examples(1) > 0


def _split(b, heads):
    """Returns how the mesh in use splits `[b, n, H * d]`; None where it does not divide the examples."""
    if b % devices_along(BATCH_AXES):
        return None
    return PartitionSpec(BATCH_AXES, None, "tensor" if heads % devices_along("tensor") == 0 else None)


def attention(q, k, v, biases, heads, mask=None, causal=False):
    """Returns the softmax attention of `q + biases[0]` to `k + biases[1]` and `v + biases[2]`, `[b, t, H * d]`.

    It is differentiable once, in reverse mode. A query without keys gets the mean of the values, and no gradient.

    Args:
      q: queries `[b, t, H * d]`, in the dtype of the values or float32.
      k, v: keys and values `[b, s, H * d]`, bfloat16; float32 also works.
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
    k, v = (x if bias is None else add(x, bias) for x, bias in zip((k, v), biases[1:], strict=True))
    dtype = jnp.zeros((), q.dtype)  # of the gradient
    q = q.astype(jnp.float32) + (0.0 if biases[0] is None else biases[0])
    # Exponentials are powers of 2 here. Rounding comes last, so that the factor costs no precision.
    q = (q * (plan.width**-0.5 * math.log2(math.e))).astype(v.dtype)
    q, k, v = (checkpoint_name(x, KEPT) for x in (q, k, v))  # what the backward kernel reads
    mask = None if mask is None else mask.astype(jnp.float32)[:, None]
    out, lse = _on_devices(_run_forward, plan, "qkkm", "ql", q, k, v, mask)
    return out, (q, k, v, biases, mask, lse, dtype)


def _backward(plan, residuals, d_out):
    q, k, v, biases, mask, lse, dtype = residuals
    d_q, d_k, d_v, sums = _on_devices(_run_backward, plan, "qkkmlq", "qkkb", q, k, v, mask, lse, d_out)
    d_biases = tuple(None if bias is None else sums[:, i].sum(0) for i, bias in enumerate(biases))
    return d_q.astype(dtype.dtype), d_k, d_v, d_biases, None


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
        """The columns of a block: at most `HEADS` heads that fit into VMEM and fill whole vectors, or all heads."""
        d, least = self.plan.width, math.lcm(self.plan.width, LANES)
        if self.width % least:
            return self.width
        options = [n for n in range(min(self.width, HEADS * d), least, -1) if n % least == 0 and self.width % n == 0]
        return next((n for n in options if self.most(n)), least)

    @property
    def padded(self):
        """The numbers of queries and keys in VMEM."""
        return _up(self.t, LANES), _up(self.s, ROWS)

    def bytes(self, columns, n):
        """Returns the bytes of VMEM that n examples with blocks of so many columns take at most."""
        t, s = self.padded
        # The backward pass: queries, their gradient and that of the output; keys, values and their gradients; all
        # twice, as the next step's are loaded meanwhile.
        block = 2 * 2 * (3 * t + 4 * s) * _up(columns, LANES)
        # Arrays in float32 of the size of the scores: a bound of what the compiler of a v5e has taken in
        # tests/test_attention_tpu.py. It keeps some for each head of a piece of straight code.
        heads = min(n * columns // self.plan.width, PAIRS)
        return n * block + int(min(2.2 * heads, 8 + 0.75 * heads) * 4 * s * t)

    def most(self, columns):
        """Returns the number of examples whose blocks of so many columns fit into VMEM."""
        return next(n for n in itertools.count() if self.bytes(columns, n + 1) > VMEM)

    def examples(self, b):
        """Returns the number of examples in a step of a kernel, a divisor of b; 0 if one does not fit into VMEM."""
        return next((n for n in range(min(b, self.most(self.columns)), 0, -1) if b % n == 0), 0)

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

    def heads(self):
        """The `_Head`s of a block."""
        d = self.plan.width
        size = LANES // d if LANES % d == 0 and self.columns % LANES == 0 else 1
        return [
            _Head(first + h, (first * d, (first + size) * d), (h * d, (h + 1) * d), h == size - 1)
            for first in range(0, self.columns // d, size)
            for h in range(size)
        ]


class _Head(NamedTuple):
    """A head of a block.

    Attributes:
      number: its number in the block.
      group: the first and the last column of the heads that it is worked on with.
      lanes: the first and the last of its own columns in the group.
      ends: whether it is the last head of its group.
    """

    number: int
    group: tuple[int, int]
    lanes: tuple[int, int]
    ends: bool


def _for_all_heads(call, examples, work):
    """Calls `finish(head, start(head))`, with `start, finish = work(i)`, for all heads of all examples i.

    Up to `PAIRS` heads of a few examples are straight code, in which the starts are `AHEAD` heads ahead: the compiler
    keeps to the order of the program so far that otherwise the matrix unit would wait for the softmax of each head.
    """
    heads = call.heads()
    together = max(n for n in range(1, examples + 1) if examples % n == 0 and (n == 1 or n * len(heads) <= PAIRS))

    def step(first, carry):
        works = [work(first * together + n) for n in range(together)]
        pairs = [(*both, head) for both in works for head in heads]
        started = [start(head) for start, _, head in pairs[:AHEAD]]
        for i, (_, finish, head) in enumerate(pairs):
            started += [start(later) for start, _, later in pairs[i + AHEAD : i + AHEAD + 1]]
            finish(head, started.pop(0))
        return carry

    jax.lax.fori_loop(0, examples // together, step, 0)


def _forward_kernel(q_ref, k_ref, v_ref, *refs, call):
    *mask_ref, out_ref, lse_ref = refs

    def work(i):
        column, outs = _column(call, mask_ref, i), []
        turned = functools.cache(lambda group: _keep(v_ref[i, :, slice(*group)], call.s).T)

        def start(head):
            columns = slice(*head.group)
            return _scores(call, _keep(k_ref[i, :, columns], call.s, head.lanes), q_ref[i, :, columns], column)

        def finish(head, scores):
            largest = jnp.max(scores, axis=0, keepdims=True)
            weights = jnp.exp2(scores - largest)
            total = jnp.sum(weights, axis=0, keepdims=True)
            v = turned(head.group)[slice(*head.lanes)]
            outs.append(_dot(v, weights.astype(v.dtype), 1, 0) * (1.0 / total))
            lse = jnp.where(largest > HIDDEN / 2, largest + jnp.log2(total), -HIDDEN)
            lse_ref[i, head.number : head.number + 1, :] = lse
            if head.ends:
                out_ref[i, :, slice(*head.group)] = jnp.concatenate(outs).astype(out_ref.dtype).T
                outs.clear()

        return start, finish

    _for_all_heads(call, len(q_ref), work)


def _backward_kernel(q_ref, k_ref, v_ref, *refs, call):
    *mask_ref, lse_ref, d_out_ref, d_q_ref, d_k_ref, d_v_ref, sums_ref = refs

    def work(i):
        column, grads = _column(call, mask_ref, i), []

        @functools.cache
        def load(group):
            q, d_out = (_keep(ref[i, :, slice(*group)], call.t) for ref in (q_ref, d_out_ref))
            k, v = (_keep(ref[i, :, slice(*group)], call.s) for ref in (k_ref, v_ref))
            return (q, k, v, d_out), (q.T, k.T, d_out.T)

        def start(head):
            (q, k, v, d_out), _ = load(head.group)
            d_out = _keep(d_out, len(d_out), head.lanes)
            return _scores(call, _keep(k, len(k), head.lanes), q, column), _dot(v, d_out, 1, 1)

        def finish(head, started):
            scores, d_weights = started
            lse = lse_ref[i, head.number : head.number + 1, :]
            if lse.shape[1] > call.t:  # what is behind the last query may be no number
                lse = jnp.where(_iota(lse.shape, 1) < call.t, lse, -HIDDEN)
            weights = jnp.exp2(scores - lse)
            mean = jnp.sum(weights * d_weights, axis=0, keepdims=True)
            d_scores = weights * (d_weights - mean)
            q, k, d_out = (x[slice(*head.lanes)] for x in load(head.group)[1])
            weights, d_scores = weights.astype(q.dtype), d_scores.astype(q.dtype)
            grads.append((_dot(k, d_scores, 1, 0), _dot(q, d_scores, 1, 1), _dot(d_out, weights, 1, 1)))
            if head.ends:
                # The queries have the other factors of the gradient of the keys.
                factors = call.plan.width**-0.5, math.log(2), 1.0
                for j, ref in enumerate((d_q_ref, d_k_ref, d_v_ref)):
                    grad = jnp.concatenate([x[j] for x in grads]).T * factors[j]
                    ref[i, :, slice(*head.group)] = grad.astype(ref.dtype)
                    sums_ref[i, j : j + 1, slice(*head.group)] = jnp.sum(grad, axis=0, keepdims=True)
                grads.clear()

        return start, finish

    _for_all_heads(call, len(q_ref), work)


def _dot(x, y, x_axis, y_axis):
    return jax.lax.dot_general(x, y, (((x_axis,), (y_axis,)), ((), ())), preferred_element_type=jnp.float32)


def _iota(shape, axis):
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def _scores(call, k, q, column):
    """Returns the scores of a head as powers of 2, float32 `[s, t]`; hidden ones are very small."""
    scores = _dot(k, q, 1, 1)
    if call.plan.causal:
        hidden = _iota(scores.shape, 0) > _iota(scores.shape, 1)
        scores = scores + jnp.where(hidden, 2 * HIDDEN, 0.0)
    if column is None:
        return scores
    first = len(scores) - len(column)
    return jnp.concatenate([scores[:first], scores[first:] + column]) if first else scores + column


def _column(call, mask_ref, i):
    """Returns what is added to the scores of the last keys of an example, float32 `[n, 1]`, or None."""
    rows, column = call.padded[1], None
    if rows != call.s and not call.plan.causal:  # a causal mask hides the rows behind the last key from all queries
        first = 0 if mask_ref else call.s // 8 * 8  # a register has 8 rows
        column = jnp.where(first + _iota((rows - first, 1), 0) < call.s, 0.0, 2 * HIDDEN)
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
