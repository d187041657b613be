"""The graph of an exported program, read into a list of known operations.

Only names are taken from the file's JSON, never code: operations of `aten` whose arguments are
tensors and numbers, sums and products of sizes, and regions with gradients or autocast turned on or
off. When the program is read, every operation is looked up, and every name has to be made before it
is used.
"""

from __future__ import annotations

import hashlib
import json
import math
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from calipers.errors import BadInput, BadModel
from calipers.interchange.exported import AUTOCAST, GRAD, Block, ExportedFile, Ref, StoredCall

DTYPES = dict(
    zip(
        (1, 2, 3, 4, 5, 6, 7, 8, 12, 13),
        (
            torch.uint8,
            torch.int8,
            torch.int16,
            torch.int32,
            torch.int64,
            torch.float16,
            torch.float32,
            torch.float64,
            torch.bool,
            torch.bfloat16,
        ),
        strict=True,
    )
)
_FORMATS = {
    1: torch.contiguous_format,
    2: torch.channels_last,
    3: torch.channels_last_3d,
    4: torch.preserve_format,
}
_TABLES: dict[str, dict[Any, Any]] = {
    "as_scalar_type": DTYPES,
    "as_memory_format": _FORMATS,
    "as_layout": {7: torch.strided},
}


def _power(base: Any, exponent: Any) -> Any:
    """Return a power of a size; refuse exponents that make huge numbers."""
    if isinstance(exponent, int) and abs(exponent) > 64:
        raise BadInput(f"a size to the power of {exponent} is out of all bounds")
    return base**exponent


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """Return g v / |v|, with one norm for each index along dim.

    With dim -1 there is one norm for all. Sizes that do not fit are refused here, since torch
    itself reads past the end of a g that is too short.
    """
    fits = dim == -1 and g.numel() == 1
    if 0 <= dim < v.dim():
        fits = v.numel() > 0 and g.shape == tuple(
            n if k == dim else 1 for k, n in enumerate(v.shape)
        )
    if not fits:
        raise BadModel(
            f"weight norm: sizes {tuple(v.shape)} and {tuple(g.shape)} do not fit together"
        )
    return torch._weight_norm(v, g, dim)


_SIZES: dict[str, Callable[..., Any]] = {
    f"_operator.{name}": getattr(operator, name)
    for name in (
        "add",
        "sub",
        "mul",
        "floordiv",
        "truediv",
        "mod",
        "neg",
        "eq",
        "ne",
        "lt",
        "le",
        "gt",
        "ge",
        "and_",
        "or_",
        "getitem",
    )
} | {
    f"torch.{name}": getattr(torch, name)
    for name in ("sym_max", "sym_min", "sym_not", "sym_ite", "sym_int", "sym_float")
}
_SIZES["_operator.pow"] = _power
_PLAIN = {
    "Tensor",
    "int",
    "float",
    "bool",
    "number",
    "str",
    "SymInt",
    "ScalarType",
    "Layout",
    "Device",
    "MemoryFormat",
    "Generator",
    "complex",
    "SymBool",
}
_INTERNAL = {  # operations beginning with _ that exported networks use
    *(
        "_to_copy",
        "_softmax",
        "_log_softmax",
        "_unsafe_view",
        "_adaptive_avg_pool2d",
        "_adaptive_avg_pool3d",
        "_native_batch_norm_legit_no_training",
    ),
    *(
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_attention_math",
        "_prelu_kernel",
    ),
    *("_assert_scalar", "_assert_async", "_weight_norm", "_cdist_forward"),
    *("_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "_conj", "_pad_circular"),
}
# compares dtypes with those of the export; here they follow the module
_TRACED = "torch.ops.aten._assert_tensor_metadata.default"
# operations that return nothing and are allowed
_SILENT = {
    "_assert_scalar",
    "_assert_async",
    "sym_constrain_range",
    "sym_constrain_range_for_size",
}
_REFUSED = {
    "from_file",
    "save",
    "set_",
    "set",
    "set_data",
    "resize_",
    "resize",
    "resize_as_",
    "backward",
    "record_stream",
    "manual_seed",
}
# operations for which torch reads past the end on odd sizes
_UNSAFE = re.compile(r"quantize|fbgemm|mkldnn|miopen|mps|embedding_bag|backward|_unsafe_(?!view)")
_LARGEST = 2**28  # most numbers that one operation may make for a point
_TRAINED = {
    "batch_norm",
    "dropout",
    "feature_dropout",
    "alpha_dropout",
    "feature_alpha_dropout",
    "native_dropout",
    "native_batch_norm",
    "cudnn_batch_norm",
}


def program_of(told: dict[str, Any], source: str) -> ExportedFile:
    """Return the program of a parsed file.

    Raises `BadInput` where it asks for anything but the operations named at the top of this module.
    """
    graph, signature = told["graph_module"]["graph"], told["graph_module"]["signature"]
    argument, held = _inputs(signature, source)
    kinds = [next(iter(spec)) for spec in signature["output_specs"]]
    if any(kind.endswith("mutation") for kind in kinds):
        raise BadInput(
            f"{source} changes its own weights or buffers while it runs: call model.eval() before "
            "torch.export.export"
        )
    if kinds != ["user_output"]:
        raise BadInput(
            f"{source} returns {len(kinds)} values; a classifier returns one tensor of logits"
        )
    block = _GraphReader(source, frozenset(held)).block(graph)
    if set(block.inputs) != {argument, *held}:
        raise BadInput(
            f"{source}: the graph's inputs are not those of its signature; the file is damaged"
        )
    shape = tuple(
        size["as_int"] if "as_int" in size else _symbol(size["as_expr"]["expr_str"])
        for size in graph["tensor_values"][argument]["sizes"]
    )
    limits = {
        name: told["range_constraints"].get(name, {}) for name in shape if isinstance(name, str)
    }
    ranges = {name: (limit.get("min_val"), limit.get("max_val")) for name, limit in limits.items()}
    text = json.dumps([_computed(graph), signature, told["range_constraints"]], sort_keys=True)
    return ExportedFile(
        source, block, argument, held, shape, ranges, hashlib.sha256(text.encode()).hexdigest()[:16]
    )


def _inputs(signature: dict[str, Any], source: str) -> tuple[str, dict[str, Any]]:
    """Return the argument's name, and where every other input comes from.

    That is the list and the name of a tensor, or a constant.
    """
    held, arguments = dict[str, Any](), list[str]()
    for spec in signature["input_specs"]:
        ((kind, facts),) = spec.items()
        if kind == "user_input" and "as_tensor" in facts["arg"]:
            arguments.append(facts["arg"]["as_tensor"]["name"])
        elif kind in ("parameter", "buffer", "tensor_constant"):
            outside = kind == "tensor_constant" or (
                kind == "buffer" and facts["persistent"] is False
            )
            held[facts["arg"]["name"]] = (
                "constants" if outside else "weights",
                facts[f"{kind}_name"],
            )
        elif kind == "constant_input" and "as_none" in facts["value"]:
            held[facts["name"]] = None
        else:
            raise BadInput(
                f"{source} takes an input that is no tensor ({kind.replace('_', ' ')}); only "
                "tensors are read"
            )
    if len(arguments) != 1:
        raise BadInput(
            f"{source} takes {len(arguments)} arguments; a classifier takes one tensor of points"
        )
    return arguments[0], held


def _symbol(text: str) -> str:
    """Return the name of a free size.

    An expression stands for itself and is never evaluated.
    """
    found = re.fullmatch(r"Symbol\('(\w+)'.*\)|(\w+)", text)
    return text if found is None else str(found[1] or found[2])


def _computed(part: Any) -> Any:
    """Return a graph without its metadata, such as positions in the source."""
    if isinstance(part, dict):
        return {name: _computed(value) for name, value in part.items() if name != "metadata"}
    return [_computed(value) for value in part] if isinstance(part, list) else part


@dataclass
class _GraphReader:
    """Reads graphs; `fixed` names weights and buffers, which stay unchanged.

    An operation that writes to one of them is refused.
    """

    source: str
    fixed: frozenset[str]
    known: set[str] = field(default_factory=set)

    def fail(self, what: str) -> BadInput:
        """Return the error for this file."""
        return BadInput(f"{self.source}: {what}")

    def block(self, graph: dict[str, Any], fixed: frozenset[str] | None = None) -> Block:
        """Return a graph's operations; an inner graph sees only its own inputs."""
        inner = _GraphReader(self.source, self.fixed if fixed is None else fixed)
        inputs = tuple(name for one in graph["inputs"] for name in _names(self.result(one)))
        inner.known |= set(inputs)
        calls = [inner.call(node) for node in graph["nodes"] if node["target"] != _TRACED]
        outputs = tuple(inner.argument(one) for one in graph["outputs"])
        wanted = set(_refs(list(outputs)))
        for k in reversed(range(len(calls))):
            here = set(_refs([*calls[k].arguments, *calls[k].named.values()])) | set(
                _names(calls[k].results)
            )
            calls[k] = replace(calls[k], last=tuple(sorted(here - wanted)))
            wanted |= here
        return Block(inputs, tuple(calls), outputs, graph["is_single_tensor_return"] is True)

    def call(self, node: dict[str, Any]) -> StoredCall:
        """Return one node as a call, and note the names that it makes."""
        target, given = (
            str(node["target"]),
            [(str(one["name"]), one["arg"]) for one in node["inputs"]],
        )
        results = tuple(self.result(one) for one in node["outputs"])
        if target in (GRAD, AUTOCAST):
            made = self.under_mode(target, [value for _, value in given], results)
        elif target in _SIZES:
            made = StoredCall(
                target,
                _SIZES[target],
                tuple(self.argument(value) for _, value in given),
                {},
                results,
            )
        else:
            made = self.operation(target, dict(given), results)
        again = self.known.intersection(_names(results))
        if again:
            raise self.fail(
                f"{target} gives the name {min(again)[:40]!r} a second time; the file is damaged"
            )
        self.known.update(_names(results))
        return made

    def under_mode(
        self, target: str, given: list[dict[str, Any]], results: tuple[Any, ...]
    ) -> StoredCall:
        """Return a region that runs with gradients or autocast turned on or off."""
        place = 1 if target == GRAD else 4
        if len(given) <= place or "as_graph" not in given[place]:
            raise self.fail(f"{target} holds no graph where one is expected; the file is damaged")
        inputs = [self.argument(value) for value in (*given[:place], *given[place + 1 :])]
        graph = given[place]["as_graph"]["graph"]
        names = [name for one in graph["inputs"] for name in _names(self.result(one))]
        fixed = {
            name
            for name, value in zip(names, inputs[place:], strict=True)
            if isinstance(value, Ref) and value.name in self.fixed
        }
        block = self.block(graph, frozenset(fixed))
        return StoredCall(target, None, tuple(inputs), {}, results, not block.single, block)

    def operation(self, target: str, given: dict[str, Any], results: tuple[Any, ...]) -> StoredCall:
        """Return a call of an aten operation, arguments in its schema's order."""
        run, base = self.looked_up(target)
        arguments, named, rest = list[Any](), dict[str, Any](), dict(given)
        for one in run._schema.arguments:
            if one.name not in rest:
                continue
            value = self.argument(rest.pop(one.name))
            if one.name in ("training", "train") and value is True and base in _TRAINED:
                raise self.fail(
                    f"{base} runs in training mode: call model.eval() before torch.export.export"
                )
            sizes = (
                [n for n in value if type(n) is int and n > 0]
                if isinstance(value, list) and "size" in one.name
                else []
            )
            if math.prod(sizes) > _LARGEST:
                raise self.fail(
                    f"{base} makes {math.prod(sizes):,} numbers for each point, more than "
                    f"{_LARGEST:,}"
                )
            if one.is_write and self.fixed.intersection(_refs([value])):
                raise self.fail(
                    f"{base} writes to the weights or buffers: call model.eval() before "
                    "torch.export.export"
                )
            if one.kwarg_only or len(arguments) != run._schema.arguments.index(one):
                named[one.name] = value
            else:
                arguments.append(value)
        if rest:
            raise self.fail(f"{target} has no argument {min(rest)[:40]!r}")
        returns = run._schema.returns
        several = len(returns) > 1 or (
            bool(returns) and len(results) == 1 and isinstance(results[0], tuple)
        )
        if several and len(returns) == 1:
            results = results[0]
        if several and len(returns) > 1 and len(results) > len(returns):
            raise self.fail(f"{target} returns {len(returns)} values, {len(results)} are named")
        return StoredCall(
            target,
            _weight_norm if base == "_weight_norm" else run,
            tuple(arguments),
            named,
            results,
            several,
        )

    def looked_up(self, target: str) -> tuple[Any, str]:
        """Return an operation of aten and its plain name.

        Only operations that compute tensors and numbers from tensors and numbers are allowed.
        """
        found = re.fullmatch(r"torch\.ops\.aten\.(\w+)\.(\w+)", target)
        base = found[1] if found else ""
        run = found and getattr(getattr(torch.ops.aten, base, None), found[2], None)
        if not isinstance(run, torch._ops.OpOverload) or not torch._C._dispatch_has_kernel(
            run.name()
        ):
            raise self.fail(
                f"the operation {target[:80]} is not known; only those of torch.ops.aten are read"
            )
        used = [str(one.type) for one in (*run._schema.arguments, *run._schema.returns)]
        plain = all(
            set(re.findall(r"\w+", re.sub(r"Optional|List|Dict|\d+", " ", kind))) <= _PLAIN
            for kind in used
        )
        silent = not run._schema.returns and base not in _SILENT
        writes = any(one.is_write and one.name != "self" for one in run._schema.arguments)
        if (
            not plain
            or silent
            or writes
            or base in _REFUSED
            or _UNSAFE.search(base)
            or (base.startswith("_") and base not in _INTERNAL)
        ):
            raise self.fail(
                f"the operation {target[:80]} is not read: it is none that a classifier computes "
                "with"
            )
        return run, base

    def argument(self, one: dict[str, Any]) -> Any:
        """Return an argument: a reference, a plain value, or a list of them.

        Plain values are numbers, text, dtypes and devices.
        """
        ((kind, value),) = one.items()
        if kind in ("as_tensor", "as_sym_int", "as_sym_float", "as_sym_bool", "as_optional_tensor"):
            return self.ref(value)
        if kind in (
            "as_tensors",
            "as_sym_ints",
            "as_sym_floats",
            "as_sym_bools",
            "as_optional_tensors",
        ):
            return [self.ref(part) for part in value]
        if kind == "as_none":
            return None
        if kind in _TABLES:
            if value not in _TABLES[kind]:
                raise self.fail(f"{kind} {value!r} is not read")
            return _TABLES[kind][value]
        if kind == "as_device":
            return torch.device("cpu")  # replaced by the device of the module when it runs
        plain = {"as_int": int, "as_float": float, "as_bool": bool, "as_string": str}
        if kind in plain and type(value) in (
            plain[kind],
            int if kind == "as_float" else plain[kind],
        ):
            return value
        if kind == "as_float" and value in ("Infinity", "-Infinity", "NaN"):
            return float(value)
        if kind.endswith("s") and kind[:-1] in plain and isinstance(value, list):
            return [self.argument({kind[:-1]: part}) for part in value]
        raise self.fail(f"an argument of the kind {kind[:40]} is not read")

    def ref(self, one: dict[str, Any]) -> Any:
        """Return a reference to a value; a number among references stays one."""
        ((kind, value),) = one.items()
        if kind in ("as_int", "as_float", "as_bool", "as_none", "as_tensor"):
            return self.argument(one)
        if value not in self.known:
            raise self.fail(f"{str(value)[:40]!r} is used before it is made; the file is damaged")
        return Ref(value)

    def result(self, one: dict[str, Any]) -> Any:
        """Return the name of a result.

        None for one that has no name, and a tuple of names for a list.
        """
        ((kind, value),) = one.items()
        if kind in ("as_tensor", "as_sym_int", "as_sym_float", "as_sym_bool"):
            return next(iter(value.values())) if set(value) <= {"name", "as_name"} else None
        if kind == "as_tensors":
            return tuple(str(part["name"]) for part in value)
        if kind in ("as_none", "as_int", "as_float", "as_bool"):
            return None
        raise self.fail(f"a result of the kind {kind[:40]} is not read")


def _names(results: Any) -> list[str]:
    """Return the names in nested results."""
    if isinstance(results, tuple):
        return [name for one in results for name in _names(one)]
    return [] if results is None else [str(results)]


def _refs(arguments: list[Any]) -> list[str]:
    """Return the names that arguments refer to."""
    return [
        name
        for one in arguments
        for name in (
            _refs(one) if isinstance(one, list) else [one.name] if isinstance(one, Ref) else []
        )
    ]
