#!/usr/bin/env python3
"""compressed-tensors quantizes and packs random small models; what moq reads from these folders is compared.

    pip install torch transformers compressed-tensors
    python3 tests/interop/schemes.py tools/moq [COUNT [SEED [FAMILY|SCHEME ...]]]

COUNT models a scheme (1), others for each SEED (1); names after SEED restrict both draws. Beside unseen.py, whose models it takes. Checked are
`moq verify`, the hashes of weights decoded here, and the logits of these weights, wide and with inputs rounded by compressed-tensors itself.
What moq refuses on purpose is told as a note. Ends with "N passed, N failed"."""
import contextlib, io, json, os, random, sys
from types import SimpleNamespace
import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM
import unseen

try:
    import compressed_tensors
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (QuantizationArgs, QuantizationConfig, QuantizationScheme, QuantizationStatus,
                                                 apply_quantization_config, preset_name_to_scheme)
    from compressed_tensors.quantization.lifecycle.forward import forward_quantize
    from compressed_tensors.quantization.utils import calculate_qparams
    from compressed_tensors.quantization.utils.helpers import generate_gparam
except ImportError as missing:
    sys.exit(f"no compressed-tensors here: {missing}")

try:
    from loguru import logger
    logger.disable("compressed_tensors")  # a warning for each weight that blocks do not divide
except ImportError:
    pass
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3", "deepseek_v3"]


def args(bits, strategy, kind="int", symmetric=True, dynamic=False):
    """strategy: a name, a group size, or the sides of a block."""
    more = {"strategy": strategy}
    if isinstance(strategy, int):
        more = {"strategy": "group", "group_size": strategy}
    elif isinstance(strategy, list):
        more = {"strategy": "block", "block_structure": strategy}
    return QuantizationArgs(num_bits=bits, type=kind, symmetric=symmetric, dynamic=dynamic, **more)


def token(kind):
    return args(8, "token", kind, dynamic=True)


BLOCKS = [128, 128]
SCHEMES = {  # weights, inputs, what row lengths must be multiples of
    "w4a8-int-128": (args(4, 128), token("int"), 128),
    "w4a8-int-channel": (args(4, "channel"), token("int"), 1),
    "w4afp8": (args(4, 128), token("float"), 128),
    "w8a8-dyn": (args(8, "channel"), token("int"), 1),
    "w8a8-dyn-group": (args(8, 32), token("int"), 32),
    "w8a8-dyn-asym": (args(8, "channel"), args(8, "token", symmetric=False, dynamic=True), 1),
    "w8a8-static": (args(8, "channel"), args(8, "tensor"), 1),
    "w8a8-static-asym": (args(8, "channel"), args(8, "tensor", symmetric=False), 1),
    "w8a8-tensor": (args(8, "tensor"), args(8, "tensor"), 1),
    "fp8-dynamic": (args(8, "channel", "float"), token("float"), 1),
    "fp8-static": (args(8, "tensor", "float"), args(8, "tensor", "float"), 1),
    "fp8-tensor-token": (args(8, "tensor", "float"), token("float"), 1),
    "fp8-tensor-dyn": (args(8, "tensor", "float"), args(8, "tensor", "float", dynamic=True), 1),
    "fp8-channel-static": (args(8, "channel", "float"), args(8, "tensor", "float"), 1),
    "fp8a16": (args(8, "tensor", "float"), None, 1),
    "fp8a16-channel": (args(8, "channel", "float"), None, 1),
    "fp8-group32": (args(8, 32, "float"), token("float"), 32),
    "fp8-block": (args(8, BLOCKS, "float"), args(8, 128, "float", dynamic=True), 128),
    "fp8-block-ragged": (args(8, BLOCKS, "float"), None, 1),
    "fp8-block-64x32": (args(8, [64, 32], "float"), args(8, 32, "float", dynamic=True), 32),
    "fp8-block-token": (args(8, BLOCKS, "float"), token("float"), 1),
}
for bits in (4, 8):
    for group, multiple in ((32, 32), (64, 64), (128, 128), (40, 80), ("channel", 1)):
        SCHEMES[f"w{bits}a16-{group}-sym"] = (args(bits, group), None, multiple)
        SCHEMES[f"w{bits}a16-{group}-asym"] = (args(bits, group, symmetric=False), None, multiple)
for bits in (2, 3, 5, 6, 7):
    SCHEMES[f"w{bits}a16-32-sym"] = (args(bits, 32), None, 32)
    SCHEMES[f"w{bits}a16-channel-asym"] = (args(bits, "channel", symmetric=False), None, 1)
for preset, multiple in (("NVFP4", 16), ("NVFP4A16", 16), ("MXFP4", 32), ("MXFP4A16", 32), ("MXFP8", 32), ("MXFP8A16", 32), ("MXFP6A16", 32),
                         ("MXFP6A8", 32), ("MXFP4xFP8", 128)):
    try:
        known = preset_name_to_scheme(preset, ["Linear"])
        SCHEMES[preset.lower()] = (known.weights, known.input_activations, multiple)
    except KeyError:
        print(f"       {preset}: not in this compressed-tensors")

REFUSED = "is no group size"  # groups of 40


# ---- cases

def draw(seed, families, scheme):
    r = random.Random(seed)
    family, m = r.choice(families), SCHEMES[scheme][2]

    def pick(*sizes):
        return r.choice([n for n in sizes if n % m == 0])

    c = dict(seed=r.randrange(1 << 30), scheme=scheme, family=family, hidden=pick(72, 96, 160, 192, 100, 128, 320, 256, 208),
             inter=pick(84, 160, 320, 352, 200, 144, 256, 128, 416), head=pick(32, 160, 80, 96, 20, 128, 64, 256, 16), heads=r.choice([1, 2, 3, 4]),
             layers=r.choice([1, 1, 2]), experts=4, top=2, vocab=r.choice([257, 130]), tie=r.random() < .3, bias=r.random() < .4, mlp_bias=False)
    if family in ("qwen2", "phi3"):  # the heads fill the hidden size
        c.update(head=min(128, c["head"]) // m * m)
        c["hidden"] = c["heads"] * c["head"]
    if family in unseen.INSIST and c["hidden"] % c["heads"]:
        c["heads"] = unseen.divisor(r, c["hidden"])
    if family.startswith("gemma"):
        c["tie"] = True
    c["expert"] = 64
    if family == "deepseek_v3":  # one dense layer: experts have no modules that the library could find
        c.update(layers=1, dense=1, shared=1, groups=1, top_groups=1, norm=True, rope=32,
                 head=max(1, min(128, c["head"]) // m) * m, kv_rank={80: 160, 128: 128}.get(m, 64), q_rank=r.choice([None, {80: 160}.get(m, 128)]))
        c["value"] = c["head"]
    c["kv_heads"] = r.choice([k for k in (1, 2, 3, 4) if c["heads"] % k == 0])
    c["dtype"], c["shard"] = r.choice(["bfloat16"] * 6 + ["float16", "float32"]), r.random() < .3
    ignored = r.choice([[], [], ["re:.*down_proj"], ["model.layers.0.self_attn.o_proj"]])
    output_too = r.random() < .2 and not c["tie"]
    c["ignore"] = ignored + ([] if output_too else ["lm_head"])
    c["cache"] = r.random() < .2 and family != "deepseek_v3"
    return c


def extremes(w, a):
    """Least and largest weight of everything that shares a scale."""
    if a.strategy == "tensor":
        return w.min().reshape(1), w.max().reshape(1)
    if a.strategy == "channel":
        return w.amin(1, keepdim=True), w.amax(1, keepdim=True)
    rows, columns = a.block_structure if a.strategy == "block" else (1, a.group_size)
    p = F.pad(w, (0, -w.shape[1] % columns, 0, -w.shape[0] % rows))
    p = p.reshape(p.shape[0] // rows, rows, p.shape[1] // columns, columns)
    return p.amin((1, 3)), p.amax((1, 3))


def calibrate(module, scheme, seen):
    """Sets scales and zero points of a module whose inputs were between the two numbers of `seen`."""
    w, a = module.weight.data, scheme.weights
    low, high = extremes(w, a)
    whole = None
    if hasattr(module, "weight_global_scale"):
        whole = generate_gparam(w.min(), w.max())
        module.weight_global_scale.data.copy_(whole)
        low, high = low.float(), high.float()
    s, z = calculate_qparams(low, high, a, global_scale=whole)
    module.weight_scale.data = s.reshape(module.weight_scale.shape).to(module.weight_scale.dtype if whole is None else s.dtype)
    if hasattr(module, "weight_zero_point"):
        module.weight_zero_point.data = z.reshape(module.weight_zero_point.shape).to(module.weight_zero_point.dtype)
    low, high = torch.tensor(seen[0]), torch.tensor(seen[1])
    if hasattr(module, "input_global_scale"):
        module.input_global_scale.data.copy_(generate_gparam(low, high))
    if hasattr(module, "input_scale"):
        s, z = calculate_qparams(low, high, scheme.input_activations)
        module.input_scale.data.copy_(s)
        if hasattr(module, "input_zero_point"):
            module.input_zero_point.data = z.to(module.input_zero_point.dtype)
    own = list(module.named_parameters(recurse=False)) + list(module.named_buffers(recurse=False))
    return {k: v.detach().clone() for k, v in own if k.startswith("input_")}


def build(c, d):
    """d/src, d/inputs.json and d/packed; returns name -> (weight args, input args, what belongs to the inputs)."""
    torch.manual_seed(c["seed"])
    r = random.Random(c["seed"])
    config = unseen.config_of(c)
    config._attn_implementation = config._experts_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, c["dtype"])).eval()
    unseen.fill(model, c)
    model.save_pretrained(d + "/src")
    tokens = {key: [[r.randrange(3, c["vocab"]) for _ in range(length)] for _ in range(count)]
              for key, count, length in (("eval", 2, 12), ("calib", 4, 16))}
    with open(d + "/inputs.json", "w") as f:
        json.dump(tokens, f)
    seen, hooks = {}, []

    def watch(name):
        def hook(module, x):
            low, high = seen.get(name, (0, 0))
            seen[name] = min(low, x[0].min().item()), max(high, x[0].max().item())
        return hook

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            hooks.append(module.register_forward_pre_hook(watch(name)))
    with torch.no_grad():
        model(torch.tensor(tokens["calib"]))
    for h in hooks:
        h.remove()
    weights, inputs, _ = SCHEMES[c["scheme"]]
    group = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs)
    apply_quantization_config(model, QuantizationConfig(config_groups={"group_0": group}, ignore=c["ignore"],
                                                        kv_cache_scheme=args(8, "tensor", "float") if c["cache"] else None))
    modules = {}
    for name, module in model.named_modules():
        found = getattr(module, "quantization_scheme", None)
        if found is not None and isinstance(module, torch.nn.Linear) and found.weights is not None:
            modules[name] = found.weights, found.input_activations, calibrate(module, found, seen[name])
        elif found is not None and hasattr(module, "k_scale"):
            module.k_scale.data.fill_(.013 * (1 + c["seed"] % 7))
            module.v_scale.data.fill_(.009)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.config.quantization_config = None
    del model.config.quantization_config
    model.save_pretrained(d + "/packed", **({"max_shard_size": "120KB"} if c["shard"] else {}))
    compressor.update_config(d + "/packed")
    return torch.tensor(tokens["eval"]), modules


# ---- packed weights in float64

def unpack(v, bits, n):
    """Rows are streams of bits, the low ones first, in words of 32."""
    v = v.numpy().view(np.uint32).astype(np.uint64)
    v = np.concatenate([v, np.zeros((v.shape[0], 1), np.uint64)], 1)
    out = np.zeros((v.shape[0], n), np.int64)
    for i in range(n):
        word, shift = divmod(i * bits, 32)
        both = v[:, word] | (v[:, word + 1] << np.uint64(32))
        out[:, i] = (both >> np.uint64(shift)) & np.uint64((1 << bits) - 1)
    return torch.from_numpy(out - (1 << (bits - 1))).double()


def e2m3(code):
    sign, exponent, fraction = -1 if code >> 5 else 1, code >> 3 & 3, (code & 7) / 8
    return sign * ((1 + fraction) * 2.0 ** (exponent - 1) if exponent else fraction)


E2M3 = torch.tensor([e2m3(code) for code in range(64)], dtype=torch.float64)


def decode(t, name, a):
    packed, s, z, whole = (t.get(f"{name}.weight_{part}") for part in ("packed", "scale", "zero_point", "global_scale"))
    if packed is None:
        q = unseen.wide(t[name + ".weight"])
        z = None if z is None else unseen.wide(z)
    elif packed.dtype == torch.int32:
        rows, columns = t[name + ".weight_shape"].tolist()
        q = unpack(packed, a.num_bits, columns)
        z = None if z is None else unpack(z.T.contiguous(), a.num_bits, rows).T
    elif a.num_bits == 4:
        q, z = unseen.E2M1[unseen.nibbles(packed, -1)], None
    else:  # four codes of 6 bits in three bytes
        b = packed.long().reshape(packed.shape[0], -1, 3)
        b = b[..., 0] | b[..., 1] << 8 | b[..., 2] << 16
        q, z = E2M3[torch.stack([b >> (6 * i) & 63 for i in range(4)], -1).flatten(1)], None
    s = torch.exp2(s.double() - 127) if s.dtype == torch.uint8 else unseen.wide(s)

    def spread(v):
        if a.strategy in ("tensor", "channel"):
            return v.reshape(-1, 1)
        rows, columns = a.block_structure if a.strategy == "block" else (1, a.group_size)
        return v.repeat_interleave(rows, 0)[:q.shape[0]].repeat_interleave(columns, 1)[:, :q.shape[1]]

    w = (q if z is None else q - spread(z)) * spread(s)
    return w if whole is None else w / unseen.wide(whole).reshape(())


def as_runtimes_do(x, a):
    """Inputs that moq rounds as the kernels do which run such folders, and not as compressed-tensors itself: symmetric INT8 per token divides
    by 127 and not by 127.5, and one scale for a whole batch, by which a token would depend on its neighbours, is one for each token."""
    if a.type == "int" and a.symmetric and a.strategy == "token":
        s = x.abs().amax(-1, keepdim=True) / 127
        return torch.clamp(torch.round(x / torch.where(s == 0, torch.ones_like(s), s)), -128, 127) * s
    if a.type == "float" and a.dynamic is True and a.strategy == "tensor":
        return unseen.round_inputs(x, ("fp8_token", None))
    return None


def reference(d, weights, modules, tokens):
    """Logits {"wide", "stored"}, and how far the latter move themselves when sums are a little wrong."""
    model = unseen.eager(d + "/src", torch.float32).double()
    named = dict(model.named_modules())
    for name, w in weights.items():
        named[name].weight.data = w.float().double()
    out, moves, noise = {}, 0.0, [0.0]
    with torch.no_grad():
        out["wide"] = model(tokens).logits
    rounded = {name: (a, own) for name, (_, a, own) in modules.items() if a is not None}
    for name, (a, own) in rounded.items():
        own = {k: v.double() if v.is_floating_point() and v.dtype != torch.float8_e4m3fn else v for k, v in own.items()}
        own = SimpleNamespace(quantization_status=QuantizationStatus.INITIALIZED, **own)

        def hook(module, x, own=own, a=a):
            x = (x[0] * (1 + noise[0] * torch.randn_like(x[0])),) + x[1:] if noise[0] else x
            flat = x[0].reshape(1, -1, x[0].shape[-1])  # latent attention has a dimension more, and would get one scale for all tokens
            y = as_runtimes_do(flat, a)
            return ((forward_quantize(own, flat, "input", a).double() if y is None else y).reshape(x[0].shape),) + x[1:]

        named[name].register_forward_pre_hook(hook)
    if rounded:
        with torch.no_grad():
            out["stored"] = model(tokens).logits
            for noise[0] in (5e-7,) * 4:
                moves = max(moves, unseen.distance(model(tokens).logits, out["stored"])[1])
    return out, moves


def examine(c, d, made, run, fnv, report, name):
    tokens, modules = made
    packed = d + "/packed"
    try:
        run("inspect", packed, "--json")
    except RuntimeError as e:
        if REFUSED in str(e):
            report.note(name, f"refused: {e}")
            return
    t = unseen.load_folder(packed)
    weights = {n: decode(t, n, a) for n, (a, _, _) in modules.items()}
    unseen.look(run, packed, {n + ".weight": fnv(w) for n, w in weights.items()}, report, name)
    want, moves = reference(d, weights, modules, tokens)
    for key, logits in want.items():
        try:
            ok, figure, median = unseen.judge(run, packed, d, logits, key, "--act", key, "--kv", "wide")
        except RuntimeError as e:
            report.check(f"{name}: {key}", False, e)
            continue
        if not ok and key == "stored" and moves > 1e-4 and median <= 10 * moves:
            report.note(f"{name}: {key}", f"{figure}; errors as those of F32 move the reference itself by {moves:.2g}")
        else:
            report.check(f"{name}: {key}", ok, figure)
    if c["cache"]:  # scales made up: that they are read is all there is to see
        run("logits", packed, "--tokens", d + "/inputs.json#eval", "--out", d + "/logits.safetensors", "--backend", "cpu", "--kv", "auto")
        report.check(f"{name}: cache", True, "its scales are read")


def build_quietly(c, d):
    with contextlib.redirect_stderr(io.StringIO()):  # bars of progress
        return build(c, d)


def cases(count, seed, families, schemes):
    for scheme in schemes:
        for i in range(count):
            c = draw(f"{scheme} {seed} {i}", families, scheme)
            yield c, f"{scheme} {i} ({c['family']}, {c['dtype']}, hidden {c['hidden']}, without {' '.join(c['ignore']) or 'nothing'})"


def main():
    chosen = unseen.arguments(1, "scheme", FAMILIES, SCHEMES)
    print("torch", torch.__version__, "transformers", unseen.transformers.__version__, "compressed-tensors", compressed_tensors.__version__)
    return unseen.examine_all(cases(*chosen), build_quietly, examine, "compressed-tensors")


if __name__ == "__main__":
    sys.exit(main())
