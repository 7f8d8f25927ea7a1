#!/usr/bin/env python3
"""Opens folders that moq wrote with the libraries of the formats and compares weights and logits.

    pip install torch transformers compressed-tensors nvidia-modelopt
    python3 tests/interop/export.py tools/moq GOLDEN [RECIPE ...]

GOLDEN holds sources/llama, sources/gpt_oss and modelopt/llama-*/calibration.safetensors. For each recipe
  compressed-tensors   transformers loads `moq quantize --format compressed-tensors`, once decompressed and, where it can, compressed
  modelopt             ModelOpt's own tensor classes decode `moq quantize`, tensor by tensor; transformers runs the weights
Then gpt-oss: transformers loads `moq quantize --format gpt-oss`, and ModelOpt's encoder gives the same bytes.
Weights are compared with `moq dequant`, logits with `moq logits`. Ends with "N passed, N failed"; what cannot be tried is said."""
import json, os, shutil, subprocess, sys, tempfile
import warnings
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, utils

warnings.filterwarnings("ignore")
utils.logging.set_verbosity_error()
utils.logging.disable_progress_bar()
MOQ, GOLDEN = os.path.abspath(sys.argv[1]), os.path.abspath(sys.argv[2])
SOURCE = GOLDEN + "/sources/llama"
RECIPES = {"nvfp4": "llama-nvfp4", "w4a16_nvfp4": "", "fp8": "llama-fp8", "fp8_per_channel_per_token": "", "fp8_2d_blockwise_weight_only": "",
           "int4_blockwise_weight_only": "", "int8": "llama-nvfp4", "int8_weight_only": "", "mxfp8": "", "mxfp4": "", "mxint8": ""}
TOKENS = torch.tensor(json.load(open(SOURCE + "/inputs.json"))["eval"])
passed = failed = 0


def moq(*words):
    r = subprocess.run([MOQ, *words], capture_output=True, text=True)
    if r.returncode > 1:
        raise RuntimeError(r.stderr.strip())
    return r.stdout


def check(what, ok, figure):
    global passed, failed
    passed += ok
    failed += not ok
    print(f"{'ok    ' if ok else 'FAILED'} {what}: {figure}", flush=True)


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def logits_of(folder, act, out):
    moq("logits", folder, "--tokens", SOURCE + "/inputs.json#eval", "--act", act, "--out", out)
    return load_file(out)["logits"]


def run(model):
    with torch.no_grad():
        return model(TOKENS).logits


def by_compressed(recipe, folder, work):
    from transformers import CompressedTensorsConfig
    moq("dequant", folder, "--out", work + "/plain", "--dtype", "f32")
    ours = load_file(work + "/plain/model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=CompressedTensorsConfig(run_compressed=False))
    differ, total = 0, 0
    for name, w in model.state_dict().items():
        if name.endswith("proj.weight"):
            total += w.numel()
            differ += (w.float() != ours[name].bfloat16().float()).sum().item()
    # a scale that is no BF16 number is multiplied in BF16 there: half a unit in the last place of BF16 each
    worst = max(relative(w, ours[n]) for n, w in model.state_dict().items() if n.endswith("proj.weight"))
    check(f"{recipe}: weights decompressed by compressed-tensors", worst < 2 ** -8, f"{differ} of {total} differ after rounding to BF16, relative rms at most {worst:.2g}")
    moq("dequant", folder, "--out", work + "/bf16", "--dtype", "bf16")
    got, want = run(model.float()), logits_of(work + "/bf16", "wide", work + "/logits.safetensors")
    check(f"{recipe}: logits of decompressed weights", relative(got, want) < 1e-5, f"relative rms {relative(got, want):.2g}")
    # In F32, so that both sides round the same inputs: in BF16 each adds noise of its own, and an input that is rounded to the other
    # neighbour moves these logits as much as the rounding itself does. The library decompresses at its first run, NVFP4 and MX weights to
    # BF16, so what was compared above is put in their place.
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        try:
            run(model)
        except RuntimeError:
            pass
        torch.nn.Module.float(model)
        for name, w in model.named_parameters():
            if name in ours and w.shape == ours[name].shape:
                w.data = ours[name].float()
        got, stored = run(model).float(), logits_of(folder, "stored", work + "/logits.safetensors")
        figure = f"relative rms {relative(got, stored):.2g} from moq --act stored, {relative(got, logits_of(folder, 'wide', work + '/logits.safetensors')):.2g} from --act wide"
        if recipe == "mxint8":  # a name of ours: the library takes the scale bytes of its inputs for integers
            print(f"       {recipe}: as the library runs it: {figure}", flush=True)
        else:
            check(f"{recipe}: as the library runs it, inputs rounded", relative(got, stored) < 5e-3, figure)
    except Exception as e:  # kernels for a CPU are missing for some formats
        print(f"       {recipe}: does not run compressed on this machine: {type(e).__name__}: {str(e).splitlines()[0][:120] if str(e) else ''}", flush=True)


def modelopt_weight(t, name):
    """One weight by ModelOpt's tensor classes, in F32."""
    from modelopt.torch.quantization import qtensor as q
    w, s, base = t[name + ".weight"], t[name + ".weight_scale"], torch.Size(t[name + ".weight"].shape)
    wide = torch.Size((base[0], base[1] * 2))
    if w.dtype == torch.uint8 and s.dtype == torch.float8_e4m3fn:
        return q.NVFP4QTensor(wide, torch.float32, w).dequantize(dtype=torch.float32, scale=s, double_scale=t[name + ".weight_scale_2"], block_sizes={-1: 16})
    if w.dtype == torch.uint8 and s.dtype == torch.uint8:
        return q.MXFP4QTensor(wide, torch.float32, w).dequantize(dtype=torch.float32, scale=s, block_sizes={-1: 32})
    if w.dtype == torch.float8_e4m3fn and s.dtype == torch.uint8:
        return q.MXFP8QTensor(base, torch.float32, w).dequantize(dtype=torch.float32, scale=s)
    if w.dtype == torch.float8_e4m3fn and s.ndim < 2:
        return q.FP8QTensor(base, torch.float32, w).dequantize(dtype=torch.float32, scale=s if s.ndim == 0 else s[:, None])
    return None


def by_modelopt(recipe, folder, work):
    moq("dequant", folder, "--out", work + "/plain", "--dtype", "f32")
    ours, t = load_file(work + "/plain/model.safetensors"), load_file(folder + "/model.safetensors")
    names = [n[: -len(".weight_scale")] for n in t if n.endswith(".weight_scale")]
    decoded = {n: modelopt_weight(t, n) for n in names}
    if any(v is None for v in decoded.values()):
        print(f"       {recipe}: ModelOpt has no class that decodes this layout", flush=True)
        return
    worst = max(relative(decoded[n], ours[n + ".weight"]) for n in names)
    equal = sum(torch.equal(decoded[n], ours[n + ".weight"]) for n in names)
    check(f"{recipe}: weights decoded by ModelOpt", worst < 1e-6, f"{equal} of {len(names)} layers equal in every bit, relative rms at most {worst:.2g}")
    plain = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(SOURCE), dtype=torch.float32)
    state = {n: v.float() for n, v in t.items() if "scale" not in n and n[: -len(".weight")] not in names}
    state.update({n + ".weight": decoded[n] for n in names})
    missing = plain.load_state_dict(state, strict=False).missing_keys
    got, want = run(plain), logits_of(folder, "wide", work + "/logits.safetensors")
    check(f"{recipe}: logits of those weights", not missing and relative(got, want) < 1e-5, f"relative rms {relative(got, want):.2g}")


def by_gpt_oss(work):
    from transformers import Mxfp4Config
    source, folder = GOLDEN + "/sources/gpt_oss", work + "/out"
    moq("quantize", source, folder, "--recipe", "mxfp4_mlp_weight_only", "--format", "gpt-oss")
    moq("dequant", folder, "--out", work + "/plain", "--dtype", "bf16")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=Mxfp4Config(dequantize=True)).state_dict()
    ours, t = load_file(work + "/plain/model.safetensors"), load_file(folder + "/model.safetensors")
    differ = sum(n not in model or not torch.equal(model[n].float(), w.float()) for n, w in ours.items())
    check("gpt-oss: tensors as transformers reads them", differ == 0, f"{differ} of {len(ours)} differ")
    try:
        from modelopt.torch.quantization.qtensor import MXFP4QTensor
    except ImportError:
        return
    names = [n[: -len("_blocks")] for n in t if n.endswith("_blocks")]
    bf16, same = load_file(source + "/model.safetensors"), 0
    for n in names:
        codes, scales = MXFP4QTensor.quantize(bf16[n].transpose(-1, -2).contiguous(), 32)
        same += torch.equal(codes._quantized_data.flatten(), t[n + "_blocks"].flatten()) and torch.equal(scales.flatten(), t[n + "_scales"].flatten())
    check("gpt-oss: bytes as ModelOpt's encoder makes them", same == len(names) > 0, f"{same} of {len(names)} stacks")


import compressed_tensors, transformers
print("torch", torch.__version__, "transformers", transformers.__version__, "compressed-tensors", compressed_tensors.__version__)
containers = [("compressed-tensors", by_compressed)]
try:
    import modelopt.torch.quantization
    import modelopt
    print("modelopt", modelopt.__version__)
    containers.append(("modelopt", by_modelopt))
except ImportError as e:
    print("no ModelOpt here:", e)
for recipe in sys.argv[3:] or RECIPES:
    for name, look in containers:
        work = tempfile.mkdtemp()
        try:
            words = ["quantize", SOURCE, work + "/out", "--recipe", recipe, "--format", name]
            if RECIPES.get(recipe):
                words += ["--calibration", f"{GOLDEN}/modelopt/{RECIPES[recipe]}/calibration.safetensors"]
            moq(*words)
            look(recipe, work + "/out", work)
        except Exception as e:
            check(f"{recipe}: {name}", False, f"{type(e).__name__}: {str(e)[:300]}")
        finally:
            shutil.rmtree(work)
if not sys.argv[3:]:
    work = tempfile.mkdtemp()
    try:
        by_gpt_oss(work)
    except Exception as e:
        check("gpt-oss", False, f"{type(e).__name__}: {str(e)[:300]}")
    finally:
        shutil.rmtree(work)
print(f"{passed} passed, {failed} failed")
sys.exit(failed != 0)
