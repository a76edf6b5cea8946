"""Keeps the compiler from rounding differently on different numbers of devices."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Operations that only move the elements of their operands, or change a sign or a type.
_MOVES = _names("""
  broadcast_in_dim concatenate convert_element_type copy copy_p dynamic_slice expand_dims gather neg
  optimization_barrier pad real reshape rev select_n slice squeeze stop_gradient transpose
""")
# Others whose result is not a product, so that an addition of it cannot be contracted.
_NO_PRODUCTS = _names("""
  abs add add_any argmax argmin bitcast_convert_type ceil clamp cummax cummin dynamic_update_slice floor iota max min
  reduce_max reduce_min reduce_sum round scatter sign sort sub
""")
# Operations that add nothing to their operands.
_FACTORS_ONLY = _names("div dot_general eq ge gt integer_pow is_finite le lt mul ne rsqrt sign sqrt square")
# Operations that evaluate a traced function on their operands. Others have one as a parameter only, such as `reduce`.
_CALLS = _names("""
  jit pjit closed_call core_call custom_jvp_call custom_vjp_call custom_vjp_call_jaxpr remat remat2 checkpoint
""")
_NESTED = _CALLS | {"scan", "while", "cond"}  # products within them are rounded when they are evaluated
_WORDS = {2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}  # by the size of a number in bytes


def round_products(closed: ClosedJaxpr, zero: Array, *inputs: Array) -> list[Array]:
    """Evaluates a traced function, with each product rounded before it is added to something.

    LLVM contracts a product and a sum into a fused multiply-add if the product has no other use. Which uses LLVM sees
    depends on how buffers are shared, and thereby on the number of devices. Here the bits of each product are combined
    by OR with those of `zero`, whose value the compiler does not know, so that it cannot contract them. All other
    optimizations of LLVM preserve the results of IEEE arithmetic.

    XLA rewrites `x / s` to `x * (1 / s)` if the scalar s has a single use, and Shardy merges equal broadcasts of a
    scalar, but only in programs for several devices. So equal broadcasts are merged here in any case.

    Args:
      closed: from `jax.make_jaxpr`.
      zero: int32 scalar, 0 at run time.
      inputs: the flattened arguments.

    Returns:
      the flattened results.
    """
    return _evaluate(closed.jaxpr, closed.consts, zero, inputs, {})


def _evaluate(
    jaxpr: Jaxpr, consts: Sequence[Any], zero: Array, inputs: Sequence[Any], broadcasts: dict[Any, Any]
) -> list[Any]:
    values: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *inputs], strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else values[atom]

    # The values that may be added to something: the results, which the caller may add, and the operands of every
    # operation that is not known to add nothing. An unknown one counts as an addition here, and in `_is_product` as a
    # product. This is safe, since rounding a value once more changes nothing.
    added = {atom for atom in jaxpr.outvars if not isinstance(atom, Literal)}
    for equation in reversed(jaxpr.eqns):
        moved_only = equation.primitive.name in _MOVES and added.isdisjoint(equation.outvars)
        if not (moved_only or equation.primitive.name in _FACTORS_ONLY):
            added.update(atom for atom in equation.invars if not isinstance(atom, Literal))
    for equation in jaxpr.eqns:
        with jax.named_scope(str(equation.source_info.name_stack)):
            results = _apply(equation, zero, [read(atom) for atom in equation.invars], broadcasts)
        if _is_product(equation):
            pairs = zip(results, equation.outvars, strict=True)
            results = [_opaque(result, zero) if var in added else result for result, var in pairs]
        values.update(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _is_product(equation: Any) -> bool:
    """Whether the last operation in computing a result may be a multiplication."""
    name: str = equation.primitive.name
    if name == "dot_general":  # a sum, unless it has a single term
        (contracted, _), _ = equation.params["dimension_numbers"]
        products: int = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
        return products < 2
    return name not in _MOVES | _NO_PRODUCTS | _NESTED


def _apply(equation: Any, zero: Array, inputs: list[Any], broadcasts: dict[Any, Any]) -> Sequence[Any]:
    """The results of one operation; control flow is rebuilt around its evaluated bodies.

    Args:
      broadcasts: those made so far, with their operands, for operations within the same body to use again.
    """
    name, params = equation.primitive.name, equation.params

    def evaluated(traced: Any, *values: Any, broadcasts: dict[Any, Any] | None = None) -> list[Any]:
        jaxpr, consts = getattr(traced, "jaxpr", traced), getattr(traced, "consts", ())
        return _evaluate(jaxpr, consts, zero, values, {} if broadcasts is None else broadcasts)

    if name == "broadcast_in_dim":
        key = id(inputs[0]), params["shape"], params["broadcast_dimensions"]
        if key not in broadcasts:
            broadcasts[key] = inputs[0], equation.primitive.bind(*inputs, **params)
        return [broadcasts[key][1]]
    if name == "scan":
        # The operands are constants, then the carry, then arrays that are scanned over. The parameters that count them
        # differ between versions of JAX, so they are counted by rank.
        body = params["jaxpr"]
        carry = len(equation.outvars) - _num_stacked(equation.outvars, body.out_avals)
        consts = len(inputs) - _num_stacked(equation.invars, body.in_avals) - carry

        def turn(carried: list[Any], of_turn: list[Any]) -> tuple[list[Any], list[Any]]:
            results = evaluated(body, *inputs[:consts], *carried, *of_turn)
            return results[:carry], results[carry:]

        options = {option: params[option] for option in ("length", "reverse", "unroll")}
        carried, stacked = lax.scan(turn, inputs[consts : consts + carry], inputs[consts + carry :], **options)
        return [*carried, *stacked]
    if name == "while":
        of_condition = params["cond_nconsts"]
        consts = of_condition + params["body_nconsts"]
        results: list[Any] = lax.while_loop(
            lambda carried: evaluated(params["cond_jaxpr"], *inputs[:of_condition], *carried)[0],
            lambda carried: evaluated(params["body_jaxpr"], *inputs[of_condition:consts], *carried),
            inputs[consts:],
        )
        return results
    if name == "cond":
        branches = [functools.partial(evaluated, branch) for branch in params["branches"]]
        return list(lax.switch(inputs[0], branches, *inputs[1:]))
    if name in _CALLS:
        kept = lax.optimization_barrier(inputs) if params.get("prevent_cse") else inputs  # `jax.checkpoint`
        return evaluated(params.get("jaxpr", params.get("call_jaxpr")), *kept, broadcasts=broadcasts)
    bound = equation.primitive.bind(*inputs, **params)
    return bound if equation.primitive.multiple_results else [bound]


def _num_stacked(outer: Sequence[Any], inner: Sequence[Any]) -> int:
    """How many arrays have one axis more outside of a scan than in its body."""
    return sum(var.aval.ndim > aval.ndim for var, aval in zip(outer, inner, strict=True))


def _opaque(result: Any, zero: Array) -> Any:
    """The same numbers, whose origin is hidden from the compiler."""
    dtype = result.dtype
    if not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize not in _WORDS:
        return result
    word = _WORDS[dtype.itemsize]
    return lax.bitcast_convert_type(lax.bitcast_convert_type(result, word) | zero.astype(word), dtype)
