"""PTX to C++ over `machine.h`: a function per kernel, a statement per instruction.

What this file does not know is an error, never a guess. Only what the kernels of this project compile to is known:
one-dimensional launches, parameters of 8 bytes, static shared memory.
"""

import re
from dataclasses import dataclass, field

GAP = 256  # bytes between shared arrays, so that running out of one is seen

WIDTHS = {"pred": "bool", "b16": "u16", "b32": "u32", "b64": "u64", "f32": "u32", "f64": "u64"}
TYPES = {"b16": "u16", "b32": "u32", "b64": "u64"}
TYPES |= {t: t for t in ("u16", "u32", "u64", "s16", "s32", "s64", "f32", "f64")}
UNSIGNED = {"s16": "u16", "s32": "u32", "s64": "u64"}
WIDER = {"s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64"}
SPECIAL = {"%tid.x": "(u32)t.id", "%ctaid.x": "(u32)machine.block", "%ntid.x": "(u32)machine.block_size",
           "%nctaid.x": "(u32)machine.blocks"}

# Of operands a, b, c of the instruction's type T. Additions and products wrap, so they are computed unsigned.
WRAPPING = {"add": "a + b", "sub": "a - b", "mul.lo": "a * b", "mad.lo": "a * b + c", "neg": "-a"}
FLOAT = {"add": "a + b", "sub": "a - b", "mul": "a * b", "neg": "-a", "fma": "std::fma(a, b, c)", "mov": "a"}
FLOAT |= {f"{name}.rn": FLOAT[name] for name in ("add", "sub", "mul", "fma")}
INTEGER = {
    "mov": "a", "and": "a & b", "or": "a | b", "xor": "a ^ b", "not": "~a", "div": "a / b", "rem": "a % b",
    "min": "std::min(a, b)", "max": "std::max(a, b)",
}
PREDICATE = {"mov": "a", "and": "a && b", "or": "a || b", "xor": "a != b", "not": "!a"}
COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "lo": "<", "hs": ">="}
CONVERSIONS = {
    "cvt.rn.f16.f32": ("to_half", "f32"), "cvt.f32.f16": ("from_half", "u16"),
    "cvt.rn.bf16.f32": ("to_bfloat", "f32"), "cvt.f32.bf16": ("from_bfloat", "u16"),
}
MMA = {
    "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32": "MMA_F16",
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32": "MMA_BF16",
}


class UnknownPTX(ValueError):
    """An instruction, operand or directive that the translator does not know."""


@dataclass
class Translation:
    code: str
    entries: list[str]  # mangled names, in the order of the table `kernels` in the code
    instructions: dict[int, str]  # PTX by line
    source_lines: dict[int, int]  # line of the .cu file by line of PTX


@dataclass
class _Function:
    name: str
    registers: dict[str, tuple[int, str]] = field(default_factory=dict)  # name -> place, type that holds it
    shared: dict[str, tuple[int, int]] = field(default_factory=dict)  # name -> offset, bytes
    body: list[str] = field(default_factory=list)


def translate(ptx: str) -> Translation:
    functions, instructions, sources = [], {}, {}
    current, source = None, 0
    for number, raw in enumerate(ptx.splitlines(), 1):
        line = raw.split("//")[0].strip()
        if match := re.match(r"(?:\.(?:weak|visible) )?\.entry (\w+)\(", line):
            current = _Function(match[1])
            functions.append(current)
            continue
        if line.startswith(".loc"):
            source = int(line.split()[2]) if line.split()[1] == "1" else source
            continue
        if current is None or not line or line in "{})" or re.match(r"\.(param|maxntid|minnctapersm|pragma)\b", line):
            continue
        if line.startswith((".section", ".file")):
            break
        if match := re.match(r"(\$?\w+):$", line):
            current.body.append(f"{_label(match[1])}:;")
            continue
        if re.match(r"\{\s*[a-z]", line):  # inline assembly in braces of its own
            line = line.removeprefix("{").removesuffix("}")
        for statement in filter(None, (part.strip() for part in line.split(";"))):
            try:
                current.body.append(_statement(current, statement, number))
            except UnknownPTX as error:
                raise UnknownPTX(f"line {number}: {statement}: {error}") from None
        instructions[number], sources[number] = line, source
    return Translation(_program(functions), [f.name for f in functions], instructions, sources)


def _program(functions: list[_Function]) -> str:
    parts = ['#include <cmath>\n#include "machine.h"\n']
    table = []
    for k, function in enumerate(functions):
        body = "\n".join(function.body)
        parts.append(
            f"static void kernel{k}(Thread& t, u64* R) {{\nswitch (t.state) {{\ncase 0:;\n{body}\n}}\n"
            "t.wait = DONE, t.line = 0;\n}\n"
        )
        arrays = ", ".join(f"{{{begin}, {size}}}" for begin, size in function.shared.values())
        table.append(f"{{kernel{k}, {len(function.registers)}, {{{arrays}}}}}")
    parts.append(f"static const Kernel kernels[] = {{{', '.join(table)}}};\n")
    parts.append(
        'extern "C" int run(int kernel, int grid, int block, const u64* args, int args_count, const Span* spans,\n'
        "                   int spans_count, int order, int counting) {\n"
        "  machine.spans.assign(spans, spans + spans_count), machine.counting = counting;\n"
        "  return machine.run(kernels[kernel], grid, block, args, args_count, order);\n}\n"
        'extern "C" const char* errors() { return machine.errors.c_str(); }\n'
        'extern "C" void traffic(u64* sectors, u64* requests) {\n'
        "  for (const auto& [key, seen] : machine.sectors)\n    for (const auto& [request, touched] : seen) {\n"
        "      const int place = 2 * key.first + key.second;\n"
        "      sectors[place] += touched.size(), ++requests[place];\n    }\n}\n"
    )
    return "\n".join(parts)


def _label(name: str) -> str:
    return name.replace("$", "_")


def _statement(f: _Function, text: str, line: int) -> str:
    if text.startswith("."):
        return _declare(f, text)
    guard = ""
    if match := re.match(r"@(!?)(%p\d+)\s+(.*)", text):
        guard = f"if ({match[1]}{_read(f, match[2], 'bool')}) "
        text = match[3]
    opcode, rest = [*text.split(None, 1), ""][:2]
    operands = [part.strip() for part in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", rest)]
    if guard and opcode.startswith(("bar.", "mma.", "ldmatrix.", "ret", "exit")):
        raise UnknownPTX("a predicate on a collective instruction")
    return f"{guard}{{ {_instruction(f, opcode, operands, line)} }}  // {line}"


def _declare(f: _Function, text: str) -> str:
    if match := re.fullmatch(r"\.reg \.(\w+)\s+(%\w+)<(\d+)>", text):
        kind, name, count = match[1], match[2], int(match[3])
        for k in range(count):
            f.registers[f"{name}{k}"] = len(f.registers), WIDTHS[kind]
        return ""
    if match := re.fullmatch(r"\.shared \.align \d+ \.b8 (\w+)\[(\d+)\]", text):
        begin = GAP + max((at + size for at, size in f.shared.values()), default=0)
        f.shared[match[1]] = -(-begin // GAP) * GAP, int(match[2])
        return ""
    raise UnknownPTX("directive")


def _read(f: _Function, operand: str, kind: str) -> str:
    """An operand as a C++ value of type `kind`."""
    if operand in f.registers:
        place, _ = f.registers[operand]
        return f"(R[{place}] & 1)" if kind == "bool" else f"as<{kind}>(R[{place}])"
    if operand in SPECIAL:
        return SPECIAL[operand]
    if operand in f.shared:
        return f"({kind}){f.shared[operand][0]}"
    if re.fullmatch(r"-?\d+|0x[0-9a-fA-F]+", operand):
        return f"({kind}){operand}{'ull' if operand.startswith('0x') else 'll'}"
    if match := re.fullmatch(r"0[fdFD]([0-9a-fA-F]+)", operand):
        return f"as<{kind}>(0x{match[1]}ull)"
    raise UnknownPTX(f"operand {operand}")


def _write(f: _Function, register: str, value: str, kind: str) -> str:
    if register not in f.registers:
        raise UnknownPTX(f"target {register}")
    place, holder = f.registers[register]
    return f"R[{place}] = ({holder})({value});" if kind == "bool" else f"R[{place}] = ({holder})bits<{kind}>({value});"


def _vector(operand: str) -> list[str]:
    return [part.strip() for part in operand.strip("{}").split(",")]


def _address(f: _Function, operand: str) -> str:
    match = re.fullmatch(r"\[([%\w]+)(?:\+(-?\d+))?\]", operand)
    if not match:
        raise UnknownPTX(f"address {operand}")
    base = match[1]
    wide = base in f.registers and f.registers[base][1] == "u64"
    return f"(u64)({_read(f, base, 'u64' if wide else 'u32')} + ({'u64' if wide else 'u32'}){match[2] or 0})"


def _instruction(f: _Function, opcode: str, operands: list[str], line: int) -> str:
    parts = opcode.split(".")
    kind = TYPES.get(parts[-1])
    if opcode in ("ret", "exit"):
        return "t.wait = DONE, t.line = 0; return;"
    if opcode in ("bra", "bra.uni"):
        return f"goto {_label(operands[0])};"
    if opcode == "bar.sync" and operands == ["0"]:
        return f"wait_for_block(t, {line}); return; case {line}:;"
    if opcode in MMA:
        out, a, b, c = map(_vector, operands)
        deposit = "".join(f"t.in[{k}] = {_read(f, x, 'u32')}; " for k, x in enumerate([*a, *b, *c]))
        return f"{deposit}wait_for_warp(t, {line}, {MMA[opcode]}); return; case {line}:; {_collect(f, out)}"
    if match := re.fullmatch(r"ldmatrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared\.b16", opcode):
        return (
            f"t.in[0] = {_address(f, operands[1])}; t.matrices = {match[1]}; t.transposed = {int(bool(match[2]))}; "
            f"wait_for_warp(t, {line}, LDMATRIX); return; case {line}:; {_collect(f, _vector(operands[0]))}"
        )
    if parts[0] in ("ld", "st"):
        return _memory(f, parts, operands, line)
    if opcode.startswith("cvta."):
        if opcode not in ("cvta.to.global.u64", "cvta.global.u64", "cvta.shared.u64", "cvta.to.shared.u64"):
            raise UnknownPTX("address space")
        return _write(f, operands[0], _read(f, operands[1], "u64"), "u64")  # one number in every space
    if parts[0] == "cvt":
        return _convert(f, opcode, parts, operands)
    if opcode.startswith("mov.b") and "{" in "".join(operands):
        return _pack(f, kind, operands)
    if parts[-1] == "pred" and parts[0] in PREDICATE:
        a, b = [_read(f, x, "bool") for x in operands[1:]] + [""] * (3 - len(operands))
        return _write(f, operands[0], _fill(PREDICATE[parts[0]], a, b), "bool")
    if kind is None:
        raise UnknownPTX("opcode")
    return _arithmetic(f, parts, operands, kind)


def _fill(expression: str, *operands: str) -> str:
    names = dict(zip("abc", operands))
    return re.sub(r"(?<![\w:])[abc](?![\w:(])", lambda m: names[m[0]], expression)


def _arithmetic(f: _Function, parts: list[str], operands: list[str], kind: str) -> str:
    name, target = ".".join(parts[:-1]), operands[0]
    if parts[0] == "setp":
        if len(parts) != 3 or parts[1] not in COMPARISONS:
            raise UnknownPTX("comparison")
        kind = UNSIGNED.get(kind, kind) if parts[1] in ("lo", "hs") else kind
        a, b = (_read(f, x, kind) for x in operands[1:])
        return _write(f, target, f"{a} {COMPARISONS[parts[1]]} {b}", "bool")
    if name == "selp":
        a, b = (_read(f, x, kind) for x in operands[1:3])
        return _write(f, target, f"{_read(f, operands[3], 'bool')} ? {a} : {b}", kind)
    if name in ("shl", "shr"):
        function = "shift_left" if name == "shl" else "shift_right"
        value = f"{function}<{kind}>({_read(f, operands[1], kind)}, {_read(f, operands[2], 'u32')})"
        return _write(f, target, value, kind)
    if name in ("shf.l.wrap", "shf.r.wrap"):
        low, high, by = (_read(f, x, "u32") for x in operands[1:])
        return _write(f, target, f"funnel_{'left' if '.l.' in name else 'right'}({low}, {high}, {by} & 31)", "u32")
    if name == "prmt":
        return _write(f, target, f"permute({', '.join(_read(f, x, 'u32') for x in operands[1:])})", "u32")
    if name == "bfi":
        if kind != "u32":
            raise UnknownPTX("width")
        return _write(f, target, f"insert_bits({', '.join(_read(f, x, 'u32') for x in operands[1:])})", "u32")
    if name in ("mul.wide", "mad.wide", "mul.hi"):
        wide = WIDER[kind]
        a, b = (f"({wide}){_read(f, x, kind)}" for x in operands[1:3])
        if name == "mul.hi":
            return _write(f, target, f"({kind})({a} * {b} >> {8 * int(kind[1:]) // 8})", kind)
        plus = f" + {_read(f, operands[3], wide)}" if name == "mad.wide" else ""
        return _write(f, target, f"{a} * {b}{plus}", wide)
    floating = kind in ("f32", "f64")
    if not floating and name in WRAPPING:
        kind = UNSIGNED.get(kind, kind)
        expression = WRAPPING[name]
    elif expression := (FLOAT if floating else INTEGER).get(name):
        pass
    else:
        raise UnknownPTX("opcode")
    value = _fill(expression, *(_read(f, x, kind) for x in operands[1:]))
    return _write(f, target, f"({kind})({value})", kind)


def _memory(f: _Function, parts: list[str], operands: list[str], line: int) -> str:
    kind = TYPES.get(parts[-1])
    if parts[:2] == ["ld", "param"]:
        match = re.fullmatch(r"\[\w+_param_(\d+)(?:\+(\d+))?\]", operands[1])
        if not match or kind is None:
            raise UnknownPTX("parameter")
        return _write(f, operands[0], f"as<{kind}>(machine.args[{match[1]}] >> 8 * {match[2] or 0})", kind)
    match = re.fullmatch(r"(ld|st)\.(global|shared)(?:\.nc)?(?:\.v([24]))?\.(\w+)", ".".join(parts))
    if not match or kind is None:
        raise UnknownPTX("memory access")
    load, count = match[1] == "ld", int(match[3] or 1)
    where, what = (operands[1], operands[0]) if load else (operands[0], operands[1])
    values = _vector(what) if match[3] else [what]
    pointer = f"machine.{match[2]}({_address(f, where)}, {count} * sizeof({kind}), {str(not load).lower()}, {line})"
    if load:
        writes = "".join(_write(f, v, f"as<{kind}>(v[{k}])", kind) + " " for k, v in enumerate(values))
        return f"u64 v[{count}]; machine.load<{kind}>({pointer}, v); {writes}"
    reads = ", ".join(f"bits({_read(f, v, kind)})" for v in values)
    return f"const u64 v[{count}] = {{{reads}}}; machine.store<{kind}>({pointer}, v);"


def _convert(f: _Function, opcode: str, parts: list[str], operands: list[str]) -> str:
    if opcode in CONVERSIONS:
        function, source = CONVERSIONS[opcode]
        kind = "u16" if function.startswith("to_") else "f32"
        return _write(f, operands[0], f"{function}({_read(f, operands[1], source)})", kind)
    integers = [TYPES.get(p) for p in parts[1:]]
    if len(integers) != 2 or None in integers or "f" in "".join(integers):
        raise UnknownPTX("conversion")
    to, source = integers
    return _write(f, operands[0], f"({to}){_read(f, operands[1], source)}", to)


def _pack(f: _Function, kind: str, operands: list[str]) -> str:
    """mov between one register and several halves or quarters of it; _ stands for nothing."""
    to, source = operands
    several = _vector(to if to.startswith("{") else source)
    bits_each = int(kind[1:]) // len(several)
    part = f"u{bits_each}"
    if to.startswith("{"):
        return f"const u64 v = {_read(f, source, kind)}; " + "".join(
            _write(f, name, f"({part})(v >> {k * bits_each})", part) + " "
            for k, name in enumerate(several) if name != "_"
        )
    value = " | ".join(f"(u64){_read(f, name, part)} << {k * bits_each}" for k, name in enumerate(several))
    return _write(f, to, f"({kind})({value})", kind)


def _collect(f: _Function, registers: list[str]) -> str:
    return " ".join(_write(f, name, f"t.out[{k}]", "u32") for k, name in enumerate(registers))
