#!/usr/bin/env python3
"""ModelOpt quantizes and exports random small models on the CPU; what moq makes of the same models and of these folders is compared.

    pip install torch transformers nvidia-modelopt
    python3 tests/interop/unseen.py tools/moq [COUNT [SEED [FAMILY|RECIPE ...]]]

COUNT models a family (4), others for each SEED (1), of awkward shapes, with a recipe, a KV recipe, exclusions and rules drawn for each;
names after SEED restrict both draws. A C compiler (CC) is needed for the hashes. Of each folder that ModelOpt exports
  verify     `moq verify` and `moq inspect` find nothing wrong
  hashes     `moq dequant --hash` against FNV-1a of the weights decoded here in float64 and rounded once to F32
  wide       `moq logits` against transformers in float64 with the decoded weights, inputs as they are
  stored     the same with inputs rounded as the folder says; stored_kv with keys and values rounded too
  quantize   `moq quantize` of the source with ModelOpt's calibration against the folder, tensor by tensor, byte by byte, and both JSON files
What differs for a reason that is known (KNOWN below) is told as a note, as is what ModelOpt itself refuses.
Ends with "N passed, N failed"."""
import contextlib, copy, ctypes, io, json, math, os, random, re, shutil, subprocess, sys, tempfile, traceback, warnings

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
warnings.filterwarnings("ignore")
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)
aten = torch.ops.aten
mtq = None  # modelopt.torch.quantization, imported in main

RECIPES = {  # moq's name: ModelOpt's constant, and what row lengths must be multiples of
    "fp8": ("FP8_DEFAULT_CFG", 1),
    "fp8_per_channel_per_token": ("FP8_PER_CHANNEL_PER_TOKEN_CFG", 1),
    "fp8_2d_blockwise_weight_only": ("FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG", 1),
    "int8": ("INT8_DEFAULT_CFG", 1),
    "int8_weight_only": ("INT8_WEIGHT_ONLY_CFG", 1),
    "int8_smoothquant": ("INT8_SMOOTHQUANT_CFG", 1),
    "int4_blockwise_weight_only": ("INT4_BLOCKWISE_WEIGHT_ONLY_CFG", 128),
    "int4_awq": ("INT4_AWQ_CFG", 128),
    "w4a8_awq_beta": ("W4A8_AWQ_BETA_CFG", 128),
    "nvfp4": ("NVFP4_DEFAULT_CFG", 16),
    "w4a16_nvfp4": ("W4A16_NVFP4_CFG", 16),
    "w4a8_nvfp4_fp8": ("W4A8_NVFP4_FP8_CFG", 32),
    "nvfp4_awq_lite": ("NVFP4_AWQ_LITE_CFG", 16),
    "nvfp4_awq_clip": ("NVFP4_AWQ_CLIP_CFG", 16),
    "nvfp4_awq_full": ("NVFP4_AWQ_FULL_CFG", 16),
    "nvfp4_svdquant": ("NVFP4_SVDQUANT_DEFAULT_CFG", 16),
    "nvfp4_four_over_six": ("NVFP4_FOUR_OVER_SIX_CFG", 16),
    "nvfp4_w4a4_weight_mse_fp8_sweep": ("NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG", 16),
    "nvfp4_w4a4_weight_local_hessian": ("NVFP4_W4A4_WEIGHT_LOCAL_HESSIAN_CFG", 16),
    "nvfp4_mlp_only": ("NVFP4_MLP_ONLY_CFG", 16),
    "nvfp4_mlp_weight_only": ("NVFP4_MLP_WEIGHT_ONLY_CFG", 32),
    "nvfp4_omlp_only": ("NVFP4_OMLP_ONLY_CFG", 16),
    "nvfp4_experts_only": ("NVFP4_EXPERTS_ONLY_CFG", 16),
    "mxfp4": ("MXFP4_DEFAULT_CFG", 32),
    "mxfp4_mlp_weight_only": ("MXFP4_MLP_WEIGHT_ONLY_CFG", 32),
    "w4a8_mxfp4_fp8": ("W4A8_MXFP4_FP8_CFG", 32),
    "mxfp8": ("MXFP8_DEFAULT_CFG", 32),
    "mamba_moe_fp8_aggressive": ("MAMBA_MOE_FP8_AGGRESSIVE_CFG", 1),
    "mamba_moe_fp8_conservative": ("MAMBA_MOE_FP8_CONSERVATIVE_CFG", 1),
    "mamba_moe_nvfp4_aggressive": ("MAMBA_MOE_NVFP4_AGGRESSIVE_CFG", 16),
    "mamba_moe_nvfp4_conservative": ("MAMBA_MOE_NVFP4_CONSERVATIVE_CFG", 16),
}
KV = {"fp8": "FP8_KV_CFG", "fp8_affine": "FP8_AFFINE_KV_CFG", "nvfp4": "NVFP4_KV_CFG", "nvfp4_affine": "NVFP4_AFFINE_KV_CFG"}
SECOND = ["fp8", "nvfp4", "w4a16_nvfp4", "mxfp8", "int8", "fp8_per_channel_per_token", "mxfp4"]  # recipes that a rule may give some layers

# Bytes that may differ: the recipe, the largest share of a folder's bytes, and why.
KNOWN = {
    # Singular vectors are unique up to their signs, and up to rotations where singular values are close; what is left is quantized.
    "nvfp4_svdquant": (1.0, "the low-rank factors of another decomposition, and codes of what they leave"),
    # ModelOpt records the reciprocal of the smoothing vector in BF16, from which the vector itself cannot be had in every bit.
    "int8_smoothquant": (.05, "the calibration record lacks bits of the smoothing vector"),
    # Two candidates of a block may have errors that are equal but for the order of the sums.
    "nvfp4_w4a4_weight_mse_fp8_sweep": (1e-3, "candidates of equal error"),
    "nvfp4_w4a4_weight_local_hessian": (1e-3, "candidates of equal error"),
}
REFUSED = "cannot be stored for a stack of experts"  # layouts that ModelOpt writes and that no runtime reads
SENTINEL = ".\\u0000backbone.pt_name_sentinel"  # what ModelOpt leaves in the names of Nemotron-H's modules


# ---- ModelOpt on a CPU, with the arithmetic of a GPU

class AsCuda(TorchDispatchMode):
    """CUDA multiplies by the reciprocal where a tensor is divided by a number, and casts a tensor of no dimensions to the type of the
    result first. ModelOpt's folders come from GPUs, and so do the bytes that moq writes."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        p, kwargs = func.overloadpacket, kwargs or {}
        if p in (aten.div, aten.div_) and len(args) == 2 and not kwargs and isinstance(args[0], torch.Tensor) and args[0].is_floating_point():
            a, b = args
            if isinstance(b, (int, float)) and a.dtype != torch.float64:
                r = (a.float() * torch.tensor(float(np.float32(1) / np.float32(b)), dtype=torch.float32)).to(a.dtype)
                return a.copy_(r) if p is aten.div_ else r
        arithmetic = (aten.div, aten.mul, aten.add, aten.sub)
        if p in arithmetic + (aten.div_, aten.mul_) and len(args) >= 2 and all(isinstance(x, torch.Tensor) for x in args[:2]):
            a, b = args[:2]
            half = (torch.bfloat16, torch.float16)
            if a.dim() > 0 and b.dim() == 0 and a.dtype in half and b.dtype == torch.float32:
                args = (a, b.to(a.dtype)) + tuple(args[2:])
            elif b.dim() > 0 and a.dim() == 0 and b.dtype in half and a.dtype == torch.float32 and p in arithmetic:
                args = (a.to(b.dtype), b) + tuple(args[2:])
        return func(*args, **kwargs)


def e2m1(a):
    """Numbers >= 0 to the nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6, ties to the even code."""
    edges = ((.25, True, 0.), (.75, False, .5), (1.25, True, 1.), (1.75, False, 1.5), (2.5, True, 2.), (3.5, False, 3.), (5., True, 4.))
    y = torch.full_like(a, 6.)
    for edge, down, value in reversed(edges):
        y = torch.where(a <= edge if down else a < edge, torch.full_like(a, value), y)
    return y


def dynamic_blocks(inputs, block_size, amax, num_bits, exponent_bits, scale_num_bits, scale_exponent_bits):
    """Stands in for ModelOpt's CUDA kernel of the same arguments: fake quantization of inputs with scales made on the fly."""
    x, n = inputs.float(), block_size
    nvfp4 = (scale_exponent_bits, scale_num_bits - scale_exponent_bits - 1) == (4, 3)
    t = F.pad(x, (0, (-x.shape[-1]) % (16 if nvfp4 else n))).reshape(-1, 16 if nvfp4 else n)
    m = t.abs().amax(1, keepdim=True)
    if nvfp4:
        g = amax.float().amax() / 2688.0
        g = torch.where(g > 0, g, torch.tensor(1e-12)).reshape(1)
        s = torch.clamp(m / (torch.tensor([6.0]) * g), max=448.).to(torch.float8_e4m3fn).float() * g
        s = torch.where(s >= 1e-5, s, torch.ones_like(s))
        y = e2m1(t.abs() / s) * s
        y = torch.where(t >= 0, y, -y)
    else:
        kind = (exponent_bits, num_bits - exponent_bits - 1) if exponent_bits else num_bits
        most = {(2, 1): 6., (4, 3): 448., (3, 2): 28., 8: 127.}[kind]
        m = m.double()
        s = torch.where(m > 0, 2.0 ** torch.ceil(torch.log2(m / most)), torch.ones_like(m)).float()
        u = t / s
        if kind == (2, 1):
            u = torch.copysign(e2m1(u.abs()), u)
        elif kind == (4, 3):
            u = u.clamp(-448, 448).to(torch.float8_e4m3fn).float()
        elif kind == 8:
            u = u.round().clamp(-127, 127)
        y = u * s
    return y.reshape(*x.shape[:-1], -1)[..., :x.shape[-1]].to(inputs.dtype)


def static_blocks(x, amax, global_amax=None, quantize_block_scales=True, M=448.0, out_dtype=None):
    """The same for weights whose blocks have an amax each."""
    from modelopt.torch.quantization import tensor_quant
    a = amax.float().reshape(-1)
    s = a / 6.0
    if quantize_block_scales:
        whole = a.amax() if global_amax is None else global_amax.float().reshape(())
        s = tensor_quant.scaled_e4m3_impl(s, whole * (448.0 / M) / 6.0)
    t, s = x.float().reshape(a.numel(), -1), s.reshape(-1, 1)
    usable = torch.where((s == 0) | ~torch.isfinite(s), torch.ones_like(s), s)
    y = e2m1(t.abs() / usable) * usable
    y = torch.where(t >= 0, y, -y)
    return torch.where(s == 0, torch.zeros_like(y), y).reshape(x.shape).to(out_dtype or x.dtype)


def import_modelopt():
    global mtq
    import modelopt
    import modelopt.torch.kernels.quantization.gemm as gemm
    import modelopt.torch.quantization
    from modelopt.torch.quantization import tensor_quant
    tensor_quant.dynamic_block_quantize_op = dynamic_blocks
    gemm.IS_AVAILABLE = True
    gemm.static_blockwise_fp4_fake_quant = static_blocks
    mtq = modelopt.torch.quantization
    return modelopt.__version__


# ---- cases

SIZES = {  # by what row lengths must be multiples of
    1: dict(hidden=[96, 160, 192, 100, 72, 130], inter=[100, 152, 202, 352, 84], head=[32, 80, 96, 20, 128], expert=[40, 72, 100],
            q_rank=72, kv_rank=40, mamba=20),
    16: dict(hidden=[96, 160, 192, 112, 208], inter=[80, 176, 208, 400, 144], head=[32, 80, 96, 16, 48], expert=[48, 80, 112],
             q_rank=48, kv_rank=48, mamba=16),
    32: dict(hidden=[96, 160, 192, 224, 320], inter=[96, 160, 352, 416], head=[32, 64, 96, 128, 160], expert=[32, 96, 160],
             q_rank=96, kv_rank=64, mamba=32),
    128: dict(hidden=[128, 256], inter=[128, 384, 256], head=[128, 256], expert=[128], q_rank=128, kv_rank=128, mamba=64),
}
INSIST = ("llama", "gemma2", "gemma3", "deepseek_v2")  # their classes want a hidden size that the heads divide, whatever head_dim says
SPLIT = ("mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3", "nemotron_h")  # gate and up of experts are one module in memory, two on disk
LAYERS = [["linear_attention", "moe", "full_attention"], ["full_attention", "mlp", "linear_attention", "moe"],
          ["full_attention", "linear_attention", "mlp"], ["linear_attention", "mlp", "linear_attention", "moe", "full_attention"]]


def divisor(r, n):
    return r.choice([k for k in (1, 2, 3, 4, 6) if n % k == 0])


def shape_of(r, family, multiple):
    """Sizes of one model; those that its family does not have are drawn all the same."""
    z = SIZES[multiple]
    c = dict(hidden=r.choice(z["hidden"]), inter=r.choice(z["inter"]), head=r.choice(z["head"]), expert=r.choice(z["expert"]),
             heads=r.choice([1, 2, 3] if multiple == 128 else [1, 2, 3, 4, 6]), layers=r.choice([1, 1, 2, 2, 4, 5]),
             vocab=r.choice([257, 1000, 130]), tie=r.random() < .3, bias=r.random() < .4, mlp_bias=r.random() < .2,
             experts=r.choice([3, 8, 5, 16]), norm=r.random() < .7, groups=1, top_groups=1)
    if family in ("qwen2", "phi3"):  # the heads fill the hidden size
        c.update(heads=min(4, max(2, c["heads"])), head=128 if multiple == 128 else min(c["head"], 96))
        c["hidden"] = c["heads"] * c["head"]
    if family in INSIST and c["hidden"] % c["heads"]:
        c["heads"] = divisor(r, c["hidden"])
    if family in ("gemma2", "gemma3"):
        c["tie"] = True
    if family == "qwen3_moe":
        c["dense_layers"] = [0] if r.random() < .3 else []
        c["layers"] = max(c["layers"], 1 + len(c["dense_layers"]))
        if r.random() < .15:
            c.update(experts=60, layers=min(2, c["layers"]))
    if family.startswith("deepseek"):
        c.update(dense=r.choice([0, 1, min(2, c["layers"])]), shared=r.choice([1, 2]), q_rank=r.choice([None, z["q_rank"]]),
                 kv_rank=z["kv_rank"], rope=r.choice([16, 32]), head=min(c["head"], 128))
        c["value"] = r.choice([c["head"], 128 if multiple == 128 else 32])
        if r.random() < .4:
            c.update(experts=8, groups=4, top_groups=2)
    if family == "gpt_oss":
        c.update(head=max(32, c["head"] // 32 * 32), tie=False)
    if family == "llama4":
        c.update(step=r.choice([1, 1, 2]), qk_norm=r.random() < .6, head=min(128, c["head"]), heads=max(2, c["heads"]))
        c["layers"] = max(c["step"], c["layers"])
    if family == "nemotron_h":
        c.update(types=r.choice(LAYERS), mamba_heads=r.choice([2, 4] if multiple == 128 else [2, 4, 6]), mamba=z["mamba"],
                 mamba_groups=r.choice([1, 2]), tie=False)
    c["kv_heads"] = divisor(r, c["heads"])
    c["top"] = min(r.choice([1, 2, 3]), c["experts"])
    # gpt-oss in F16: transformers keeps its norms in F32 when it loads the model, so ModelOpt writes another type than the source has
    c["dtype"] = r.choice(["bfloat16"] * 7 + ([] if family == "gpt_oss" else ["float16"] * 2) + ["float32"])
    c["shard"] = r.random() < .35
    return c


def exclusions(r, family):
    split = family in SPLIT
    parts = [["*q_proj*", "*layers.1*"], ["*experts*"]] if split else [["*.layers.*.mlp.up_proj"], ["model.layers.0.self_attn.*", "*gate_proj*"]]
    return r.choice([["*layers.0*"], ["*o_proj"], ["*down_proj*"], ["*self_attn*"]] + parts)


def draw(seed, family, recipes):
    """One case: shape, recipe, recipe of the cache, and sometimes exclusions or a rule."""
    r = random.Random(seed)
    mamba = [n for n in recipes if n.startswith("mamba") and family == "nemotron_h"]
    others = [n for n in recipes if not n.startswith("mamba")]
    recipe = r.choice(mamba if mamba and (not others or r.random() < .4) else others)
    constant, multiple = RECIPES[recipe]
    c = dict(shape_of(r, family, multiple), family=family, recipe=recipe, seed=r.randrange(1 << 30), exclude=[], rule=None)
    c["kv"] = r.choice([None, None, "fp8", "nvfp4", "fp8_affine", "nvfp4_affine"])
    if c["kv"] and c["kv"].startswith("nvfp4") and c["head"] % 16:
        c["kv"] = "fp8"
    # Latent attention has no keys and values to round; recipes with an empty "algorithm" run no calibration, which the cache would need.
    if family.startswith("deepseek") or not getattr(mtq, constant).get("algorithm"):
        c["kv"] = None
    chance = r.random()
    places = ["*mixer*", "*layers.1*", "*layers.0*"] if family == "nemotron_h" else ["*self_attn*", "*mlp*", "*o_proj", "*layers.0*"]
    if chance < .25 and not recipe.startswith("mamba"):
        c["exclude"] = exclusions(r, family)
    elif chance < .4 and recipe in SECOND:
        second = [n for n in SECOND if n != recipe and RECIPES[n][1] <= multiple]
        if second:
            c["rule"] = (r.choice(places), r.choice(second))
    return c


def title(c):
    parts = [c["family"], c["recipe"], c["dtype"], f"hidden {c['hidden']}", f"layers {c['layers']}"]
    if c["kv"]:
        parts.append("kv " + c["kv"])
    if c["exclude"]:
        parts.append("without " + " ".join(c["exclude"]))
    if c["rule"]:
        parts.append(f"{c['rule'][0]} as {c['rule'][1]}")
    return ", ".join(parts)


# ---- models

def config_of(c):
    t, b = transformers, dict(
        hidden_size=c["hidden"], intermediate_size=c["inter"], num_hidden_layers=c["layers"], num_attention_heads=c["heads"],
        num_key_value_heads=c["kv_heads"], head_dim=c["head"], vocab_size=c["vocab"], max_position_embeddings=256,
        tie_word_embeddings=c["tie"], bos_token_id=1, eos_token_id=2, pad_token_id=0)
    family, small = c["family"], dict(b, intermediate_size=c["expert"])
    heads = {k: v for k, v in b.items() if k != "head_dim"}
    counts = dict(num_local_experts=c["experts"], num_experts_per_tok=c["top"])
    if family == "llama":
        return t.LlamaConfig(**b, attention_bias=c["bias"], mlp_bias=c["mlp_bias"])
    if family == "mistral":
        return t.MistralConfig(**b, sliding_window=None)
    if family == "qwen2":
        return t.Qwen2Config(**heads)
    if family == "qwen3":
        return t.Qwen3Config(**b, attention_bias=c["bias"])
    if family == "phi3":
        return t.Phi3Config(**heads)
    if family == "gemma2":
        return t.Gemma2Config(**b, sliding_window=8, query_pre_attn_scalar=c["head"])
    if family == "gemma3":
        return t.Gemma3TextConfig(**b, sliding_window=8, query_pre_attn_scalar=c["head"])
    if family == "mixtral":
        return t.MixtralConfig(**small, **counts)
    if family == "gpt_oss":
        return t.GptOssConfig(**small, **counts, sliding_window=8)
    if family == "qwen3_moe":
        return t.Qwen3MoeConfig(**b, num_experts=c["experts"], num_experts_per_tok=c["top"], moe_intermediate_size=c["expert"],
                                norm_topk_prob=c["norm"], mlp_only_layers=c["dense_layers"])
    if family == "llama4":
        return t.Llama4TextConfig(**small, intermediate_size_mlp=c["inter"], num_local_experts=c["experts"], num_experts_per_tok=1,
                                  interleave_moe_layer_step=c["step"], use_qk_norm=c["qk_norm"], attention_chunk_size=16)
    if family == "nemotron_h":
        del b["num_hidden_layers"]
        return t.NemotronHConfig(
            **b, layers_block_type=c["types"], mamba_num_heads=c["mamba_heads"], mamba_head_dim=c["mamba"], ssm_state_size=16,
            n_groups=c["mamba_groups"], conv_kernel=4, chunk_size=16, n_routed_experts=c["experts"], num_experts_per_tok=c["top"],
            moe_intermediate_size=c["expert"], moe_shared_expert_intermediate_size=c["expert"], n_shared_experts=1, n_group=1, topk_group=1,
            use_mamba_kernels=False)
    latent = dict(heads, num_key_value_heads=c["heads"], moe_intermediate_size=c["expert"], n_routed_experts=c["experts"],
                  num_experts_per_tok=c["top"], n_shared_experts=c["shared"], first_k_dense_replace=c["dense"], n_group=c["groups"],
                  topk_group=c["top_groups"], q_lora_rank=c["q_rank"], kv_lora_rank=c["kv_rank"], qk_nope_head_dim=c["head"],
                  qk_rope_head_dim=c["rope"], v_head_dim=c["value"], routed_scaling_factor=1.5)
    if family == "deepseek_v3":
        return t.DeepseekV3Config(**latent, norm_topk_prob=c["norm"])
    return t.DeepseekV2Config(**latent, topk_method="group_limited_greedy" if c["groups"] > 1 else "greedy")


FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3", "mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "deepseek_v2",
            "llama4", "nemotron_h"]


def fill(m, c):
    """Weights with some large rows and columns: what AWQ, SmoothQuant and the searches are for."""
    zero_centred = c["family"] in ("gemma2", "gemma3")  # the norm multiplies by 1 + w
    named = list(m.named_parameters()) + [(n, b) for n, b in m.named_buffers() if n.endswith("e_score_correction_bias")]
    for name, p in named:
        last = name.split(".")[-1]
        if last in ("A_log", "D", "dt_bias"):
            continue
        w = torch.randn(p.shape)
        if "conv1d" in name:
            w = w * .3
        elif last == "e_score_correction_bias":
            w = w * .05
        elif last.endswith("bias") or "sinks" in name:
            w = w * .1
        elif "embed" in name:
            w = w * (.1 if c["tie"] or zero_centred else .5)
        elif p.dim() >= 2:
            stack = p.dim() == 3 and c["family"] in ("gpt_oss", "llama4")  # [expert, in, out]
            column, k = torch.ones(p.shape[-1]), max(1, p.shape[-1] // 40)
            column[torch.randperm(p.shape[-1])[:k]] = 1 + 7 * torch.rand(k)
            w = w / math.sqrt(p.shape[-2 if stack else -1]) * column
            if p.shape[-2] > 4:
                w[..., torch.randint(p.shape[-2], (1,)), :] *= 4
        else:
            k = max(1, p.numel() // 50)
            w = w * .2
            w[torch.randperm(p.numel())[:k]] += 3 * torch.rand(k)
            w = w if zero_centred else 1 + w
        with torch.no_grad():
            p.copy_(w)
    for module in m.modules():  # as real folders have it
        if getattr(module, "e_score_correction_bias", None) is not None:
            module.e_score_correction_bias.data = module.e_score_correction_bias.data.float()


def eager(folder, dtype, **more):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager", experts_implementation="eager", **more)


def quant_config(c):
    """ModelOpt's recipe with the cache's behind it, then the rule, the exclusions, and what the recipe itself leaves out."""
    cfg = copy.deepcopy(getattr(mtq, RECIPES[c["recipe"]][0]))
    cache = list(copy.deepcopy(getattr(mtq, KV[c["kv"]]))["quant_cfg"]) if c["kv"] else []
    method = cfg.get("algorithm")
    method = {"method": method} if isinstance(method, str) else method
    if method and method.get("method", "").startswith("awq"):
        method = dict(method, debug=True)  # keeps the statistics, which the calibration file needs
    own = list(cfg["quant_cfg"])
    more = []
    if c["rule"]:
        where, second = c["rule"]
        for q in copy.deepcopy(getattr(mtq, RECIPES[second][0]))["quant_cfg"]:
            if q["quantizer_name"] in ("*weight_quantizer", "*input_quantizer"):
                more.append({**q, "quantizer_name": where.rstrip("*") + q["quantizer_name"]})
        if not any("input" in q["quantizer_name"] for q in more):
            more.append({"quantizer_name": where.rstrip("*") + "*input_quantizer", "enable": False})
        more += copy.deepcopy([q for q in own if q.get("enable") is False and q["quantizer_name"] != "*"])
    more += [{"quantizer_name": e + ("" if e.endswith("*") else "*"), "enable": False} for e in c["exclude"]]
    # once more behind patterns of self_attn, which hit the cache's quantizers too
    cfg.update(algorithm=method, quant_cfg=own + cache + more + (copy.deepcopy(cache) if more else []))
    return cfg


def dump_calibration(model, path):
    """What tests/data and the goldens call a calibration file: every statistic that ModelOpt found, under its own names."""
    from modelopt.torch.quantization.nn import TensorQuantizer
    fields = (("_amax", "amax"), ("_global_amax", "global_amax"), ("_pre_quant_scale", "pre_quant_scale"), ("_bias_value", "bias_value"))
    out = {}
    for name, module in model.named_modules():
        found = []
        if isinstance(module, TensorQuantizer) and module.is_enabled:
            found = [(key, getattr(module, field, None)) for field, key in fields]
        if hasattr(module, "awq_lite"):
            found += [("awq_lite." + key, getattr(module.awq_lite, key, None)) for key in ("act_scale", "weight_scale", "best_scale")]
        out.update({f"{name}.{key}": v.detach().float().clone().contiguous() for key, v in found if isinstance(v, torch.Tensor)})
    if out:
        save_file(out, path)


def build(c, d):
    """d/src, d/inputs.json, d/calibration.safetensors and d/exported."""
    from modelopt.torch.export import export_hf_checkpoint
    torch.manual_seed(c["seed"])
    r, dtype = random.Random(c["seed"]), getattr(torch, c["dtype"])
    config = config_of(c)
    config._attn_implementation = config._experts_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    fill(model, c)
    tokens = {key: [[r.randrange(3, c["vocab"]) for _ in range(length)] for _ in range(count)]
              for key, count, length in (("eval", 2, 12), ("calib", 8, 16))}
    with open(d + "/inputs.json", "w") as f:
        json.dump(tokens, f)
    model.save_pretrained(d + "/src", **({"max_shard_size": "200KB"} if c["shard"] else {}))
    model = eager(d + "/src", dtype).eval()
    batches = torch.tensor(tokens["calib"]).split(2)
    silent = io.StringIO()
    with contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent), torch.no_grad(), AsCuda():
        mtq.quantize(model, quant_config(c), forward_loop=lambda m: [m(x) for x in batches])
        dump_calibration(model, d + "/calibration.safetensors")
        export_hf_checkpoint(model, export_dir=d + "/exported", **({"max_shard_size": "150KB"} if c["shard"] else {}))
    return torch.tensor(tokens["eval"])


# ---- exported weights in float64, from their bytes

E2M1 = torch.tensor([0, .5, 1, 1.5, 2, 3, 4, 6, -0., -.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)


def wide(t):
    return t.float().double() if t.dtype == torch.float8_e4m3fn else t.double()


def e4m3(v):
    """float64 to the nearest E4M3, ties to even, saturating; no rounding in between."""
    a = v.abs()
    _, e = torch.frexp(a)
    step = torch.exp2((e - 1).clamp(min=-6).double() - 3)
    return torch.copysign((torch.round(a / step) * step).clamp(max=448), v)


def nibbles(t, dim):
    """The low one first along dim."""
    dim %= t.dim()
    return torch.stack([(t & 15).long(), (t >> 4).long()], dim + 1).flatten(dim, dim + 1)


def spread(s, n, dim=-1):
    """A scale for each group of columns (or rows) to one for each of n."""
    return s.repeat_interleave(n // s.shape[dim], dim)


def decode(t, name, stack):
    """The weight in float64 as it lies, and how its inputs are rounded: None or (kind, scale[, the weight that such inputs meet])."""
    key = name + ("_" if stack else ".")
    w, s, s2, si = (t.get(key + part) for part in ("weight", "weight_scale", "weight_scale_2", "input_scale"))
    w = t[name] if stack else w
    if w.dtype == torch.uint8 and s.dtype == torch.float8_e4m3fn:  # NVFP4; stacks are packed along their rows
        dim = 1 if stack and s.shape[-1] == w.shape[-1] else -1
        q = E2M1[nibbles(w, dim)]
        block = q.shape[dim] // s.shape[dim]
        return q * spread(wide(s), q.shape[dim], dim) * wide(s2), None if si is None else ("nvfp4" if block == 16 else "fp8", si)
    if w.dtype == torch.uint8 and s.dtype == torch.uint8:  # MXFP4
        q = E2M1[nibbles(w, -1)]
        return q * spread(torch.exp2(s.double() - 127), q.shape[-1]), ("mxfp4", si)
    if w.dtype == torch.uint8:  # INT4, packed along the outputs
        n = nibbles(w, -2)
        q = torch.where(n > 7, n - 16, n).double()
        q = q * spread(wide(s), q.shape[-1])
        return q, None if s2 is None else ("w4a8", si, e4m3(q / wide(s2)) * wide(s2))
    if w.dtype == torch.float8_e4m3fn and s.dtype == torch.uint8:
        return wide(w) * spread(torch.exp2(s.double() - 127), w.shape[-1]), ("mxfp8", None)
    if w.dtype == torch.int8:
        s = wide(s).reshape(()) if s.numel() == 1 else wide(s).reshape(-1, 1)
        return wide(w) * s, None if si is None else ("int8", si)
    w, s = wide(w), wide(s)
    if s.dim() == 4 or (s.numel() > 1 and list(s.shape) == [-(-n // 128) for n in w.shape]):  # FP8 in blocks of 128 by 128
        s = s[:, 0, :, 0] if s.dim() == 4 else s
        return w * s.repeat_interleave(128, 0)[:w.shape[0]].repeat_interleave(128, 1)[:, :w.shape[1]], None
    if s.numel() == 1:
        return w * s.reshape(()), None if si is None else ("fp8", si)
    return w * (s.reshape(-1, *[1] * (w.dim() - 1)) if s.dim() == 1 else s), ("fp8_token", None)


def round_inputs(x, rule):
    kind = rule[0]
    scale = None if rule[1] is None else wide(rule[1]).reshape(())
    if kind in ("fp8", "w4a8"):
        return e4m3(x / scale) * scale
    if kind == "int8":
        return torch.clamp(torch.round(x / scale), -128, 127) * scale
    if kind == "fp8_token":
        s = x.abs().amax(-1, keepdim=True) / 448
        s = torch.where(s == 0, torch.ones_like(s), s)
        return e4m3(x / s) * s
    t = x.reshape(-1, 16 if kind == "nvfp4" else 32)
    m = t.abs().amax(1, keepdim=True)
    if kind == "nvfp4":
        s = e4m3(m / (6 * scale)) * scale
        y = torch.copysign(e2m1((t / torch.where(s == 0, torch.ones_like(s), s)).abs()) * s, t)
    else:
        s = torch.where(m > 0, 2.0 ** torch.ceil(torch.log2(m / (6 if kind == "mxfp4" else 448))).clamp(-127, 127), torch.ones_like(m))
        y = (torch.copysign(e2m1((t / s).abs()), t) if kind == "mxfp4" else e4m3(t / s)) * s
    return y.reshape(x.shape)


def round_cache(x, algo, scale, bias):
    scale = torch.tensor(1.0, dtype=torch.float64) if scale is None else wide(scale).reshape(())
    if algo.startswith("NVFP4"):
        return round_inputs(x, ("nvfp4", scale / 6))
    bias = 0 if bias is None else wide(bias)
    return e4m3((x - bias) / scale) * scale + bias


class Layers(TorchFunctionMode):
    """Products with weights of the table: AWQ's vector and the low-rank branch always, rounded inputs if asked for, and if asked for
    with errors as large as those of sums in F32."""

    def __init__(self, table, rounded, noise=0.0):
        super().__init__()
        self.table, self.rounded, self.noise = table, rounded, noise

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        products = (F.linear, torch.matmul, torch.bmm, torch.Tensor.matmul, torch.Tensor.__matmul__)
        e = None
        if func in products and len(args) > 1 and isinstance(args[1], torch.Tensor):
            e = self.table.get((args[1].data_ptr(), args[1].numel()))
        if e is None:
            return func(*args, **kwargs)
        x, w, rule = args[0], args[1], e["rule"]
        if e["vector"] is not None:
            x = x * e["vector"]
        y = x
        if self.noise:
            y = x = x * (1 + self.noise * torch.randn_like(x))
        if self.rounded and rule:
            y, w = round_inputs(x, rule), rule[2] if rule[0] == "w4a8" else w
        y = func(y, w, *args[2:], **kwargs)
        return y if e["low_rank"] is None else y + (x @ e["low_rank"][0].T) @ e["low_rank"][1].T


def load_folder(d):
    t = {}
    for name in sorted(os.listdir(d)):
        if name.startswith("model") and name.endswith(".safetensors"):
            t.update(load_file(d + "/" + name))
    return t


def algorithm(said, name):
    """What hf_quant_config.json says about a layer."""
    layers = said.get("quantized_layers")
    if not layers:
        return said.get("quant_algo")
    known = [k for k in layers if name == k or name.startswith(k + ".")]
    return layers[max(known, key=len)].get("quant_algo") if known else None


def in_memory(parameters, name):
    """The parameter that holds the module `name` of the folder."""
    name = name.replace("block_sparse_moe", "mlp")
    name = re.sub(r"^backbone\.", "model.", name)
    m = re.match(r"(.*\.experts)\.(\d+)\.(\w+)$", name)
    if not m:
        return parameters[name + ".weight"]
    stack, expert, part = m.group(1), int(m.group(2)), {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}.get(m.group(3), m.group(3))
    joined = stack + ".gate_up_proj"
    return parameters[joined if part != "down_proj" and joined in parameters else f"{stack}.{part}"][expert]


def decode_folder(t, said):
    """(name, is a stack) -> weight, rule, vector, low-rank factors."""
    names = [(k[:-len(".weight_scale")], False) for k in t if k.endswith(".weight_scale")]
    names += [(k[:-len("_weight_scale")], True) for k in t if k.endswith("_weight_scale")]
    layers = {}
    for name, stack in sorted(names):
        w, rule = decode(t, name, stack)
        if rule and rule[0] == "mxfp4" and algorithm(said, name) == "W4A8_MXFP4_FP8":
            rule = ("fp8_token", None) if rule[1] is None else ("fp8", rule[1])
        factors = [t.get(f"{name}.weight_quantizer._svdquant_lora_{x}") for x in "ab"]
        vector = t.get(name + ".pre_quant_scale")
        layers[name, stack] = dict(weight=w, rule=rule, vector=None if vector is None else vector.double(),
                                   low_rank=None if factors[0] is None else [f.double() for f in factors])
    return layers


def reference(exported, d, tokens):
    """Logits by transformers in float64: {"wide", "stored", "stored_kv"}; how far the latter two move themselves when sums are a little
    wrong; the decoded layers; what transformers did not load."""
    t, said = load_folder(exported), {}
    if os.path.exists(exported + "/hf_quant_config.json"):
        with open(exported + "/hf_quant_config.json") as f:
            said = json.load(f)["quantization"]
    layers = decode_folder(t, said)
    extra = re.compile(r"(weight_scale(_2)?|input_scale|pre_quant_scale|_svdquant_lora_[ab]|\.[kv]_(scale|bias))$")
    plain = {k: v.float() if v.is_floating_point() else v for k, v in t.items() if not extra.search(k)}
    plain.update({name if stack else name + ".weight": e["weight"].float() for (name, stack), e in layers.items()})
    os.makedirs(d)
    with open(exported + "/config.json") as f:
        config = json.load(f)
    config.pop("quantization_config", None)
    with open(d + "/config.json", "w") as f:
        json.dump(dict(config, dtype="float32"), f)
    save_file({k: v.contiguous().clone() for k, v in plain.items()}, d + "/model.safetensors", metadata={"format": "pt"})
    try:
        model, info = eager(d, torch.float32, output_loading_info=True)
    except RuntimeError as e:
        return {}, {}, layers, [" ".join(str(e).split())[:200]]
    wrong = list(info["missing_keys"]) + [k for k in info["unexpected_keys"] if "rotary" not in k]
    if wrong:
        return {}, {}, layers, wrong
    model = model.double().eval()
    parameters, table = dict(model.named_parameters()), {}
    for (name, stack), e in layers.items():
        p = parameters[re.sub(r"^backbone\.", "model.", name)] if stack else in_memory(parameters, name)
        for x in [p] + (list(p) if stack else []):  # stacks are multiplied whole or expert by expert
            before = table.get((x.data_ptr(), x.numel()))
            if before and e["rule"] and e["rule"][0] == "w4a8":  # gate is there already, this is up
                e = dict(e, rule=(*e["rule"][:2], torch.cat([before["rule"][2], e["rule"][2]])))
            table[x.data_ptr(), x.numel()] = e
    out, moves = {}, {}

    def rounded(key):
        with Layers(table, True):
            out[key] = model(tokens).logits
        for _ in range(4):
            with Layers(table, True, 5e-7):
                moves[key] = max(moves.get(key, 0), distance(model(tokens).logits, out[key])[1])

    with torch.no_grad():
        with Layers(table, False):
            out["wide"] = model(tokens).logits
        if any(e["rule"] for e in layers.values()):
            rounded("stored")
        algo = said.get("kv_cache_quant_algo")
        if algo:
            code = sys.modules[type(model).__module__]
            plain_attention = code.eager_attention_forward

            def attention(module, q, k, v, *rest, **more):
                def of(end):
                    return next((x for n, x in t.items() if f"layers.{module.layer_idx}." in n and n.endswith(end)), None)
                k = round_cache(k, algo, of(".k_scale"), of(".k_bias"))
                return plain_attention(module, q, k, round_cache(v, algo, of(".v_scale"), of(".v_bias")), *rest, **more)

            code.eager_attention_forward = attention
            try:
                rounded("stored_kv")
            finally:
                code.eager_attention_forward = plain_attention
    return out, moves, layers, []


# ---- comparing

def distance(a, b):
    """Relative rms of all logits, and the median of the tokens'."""
    by_token = (a - b).pow(2).mean(-1).sqrt() / b.pow(2).mean(-1).sqrt()
    return ((a - b).norm() / b.norm()).item(), by_token.median().item()


def declined(e):
    """Whether the libraries raised e, and not a line of these scripts."""
    return os.path.dirname(os.path.abspath(__file__)) != os.path.dirname(os.path.abspath(traceback.extract_tb(e.__traceback__)[-1].filename))


class Hash:
    """FNV-1a of 64 bits over the F32 numbers of a tensor, compiled: a loop over bytes is nothing for Python."""
    SOURCE = """#include <stddef.h>
#include <stdint.h>
uint64_t fnv(const unsigned char *p, size_t n)
{
    uint64_t h = 0xcbf29ce484222325u;
    for (size_t i = 0; i < n; i++) h = (h ^ p[i]) * 0x100000001b3u;
    return h;
}
"""

    def __init__(self, folder):
        with open(folder + "/fnv.c", "w") as f:
            f.write(self.SOURCE)
        subprocess.check_call([os.environ.get("CC", "cc"), "-O2", "-shared", "-fPIC", "-o", folder + "/fnv.so", folder + "/fnv.c"])
        self.call = ctypes.CDLL(folder + "/fnv.so").fnv
        self.call.restype, self.call.argtypes = ctypes.c_uint64, [ctypes.c_void_p, ctypes.c_size_t]

    def __call__(self, t):
        t = t.detach().float().contiguous()
        return "%016x" % self.call(t.data_ptr(), t.numel() * 4)


def hashes_of(layers, fnv):
    """As `moq dequant --hash` names them: stacks whole and each of their experts, rows first."""
    out = {}
    for (name, stack), e in layers.items():
        if not stack:
            out[name + ".weight"] = fnv(e["weight"])
            continue
        w = e["weight"].transpose(-1, -2).float()
        out[name] = fnv(w)
        out.update({f"{name}[{i}]": fnv(one) for i, one in enumerate(w)})
    return out


def differences(a, b, path=""):
    if isinstance(a, dict) and isinstance(b, dict):
        return [x for k in sorted(set(a) | set(b)) for x in differences(a.get(k, "absent"), b.get(k, "absent"), path + "/" + k)]
    same = a == b or path.endswith("producer/version")
    return [] if same else [f"{path} ours {json.dumps(a)[:120]} theirs {json.dumps(b)[:120]}"]


def compare_folders(ours, theirs):
    """What is wrong in names, types, shapes and JSON; the tensors whose bytes differ, the bytes that differ and all bytes."""
    a, b, wrong = load_folder(ours), load_folder(theirs), []
    for who, names in (("ours", set(a) - set(b)), ("theirs", set(b) - set(a))):
        if names:
            wrong.append(f"{len(names)} tensors only {who}, as {min(names)}")
    bad, count, total = [], 0, 0
    for name in sorted(set(a) & set(b)):
        x, y = a[name], b[name]
        if x.dtype != y.dtype or x.shape != y.shape:
            wrong.append(f"{name} ours {x.dtype} {list(x.shape)} theirs {y.dtype} {list(y.shape)}")
            continue
        x, y = (v.contiguous().reshape(-1).view(torch.uint8) for v in (x, y))
        differ = int((x != y).sum())
        bad += [name] if differ else []
        count, total = count + differ, total + x.numel()
    for name in ("hf_quant_config.json", "config.json", "generation_config.json"):
        found = []
        for folder in (ours, theirs):
            path = f"{folder}/{name}"
            if os.path.exists(path):
                with open(path) as f:
                    text = f.read().replace(SENTINEL, "").replace('"backbone.embeddings"', '"backbone.embedding"')  # as the tensor is called
                    found.append(json.loads(text))
            else:
                found.append(None)
        wrong += [name + x for x in differences(*found)]
    return wrong, bad, count, total


class Report:
    def __init__(self):
        self.passed = self.failed = self.notes = 0

    def check(self, what, ok, figure):
        self.passed += bool(ok)
        self.failed += not ok
        print(f"{'ok    ' if ok else 'FAILED'} {what}: {figure}", flush=True)

    def note(self, what, text):
        self.notes += 1
        print(f"note   {what}: {text}", flush=True)


def runner(program):
    program = os.path.abspath(program)

    def run(*words):
        r = subprocess.run([program, *words], capture_output=True, text=True, timeout=600)
        if r.returncode:
            raise RuntimeError(" ".join((r.stderr or r.stdout).split())[:400])
        return r.stdout

    return run


def look(run, folder, mine, report, name):
    """verify, inspect, and the hashes of all quantized weights."""
    try:
        run("verify", folder)
        json.loads(run("inspect", folder, "--json"))
        report.check(f"{name}: verify", True, "nothing wrong")
    except RuntimeError as e:
        report.check(f"{name}: verify", False, e)
    try:
        got = {line.split("\t")[0]: line.split("\t")[2] for line in run("dequant", folder, "--hash").splitlines()}
    except RuntimeError as e:
        report.check(f"{name}: hashes", False, e)
        return
    bad = sorted(k for k in set(got) | set(mine) if got.get(k) != mine.get(k))
    report.check(f"{name}: hashes", not bad, f"{len(mine)} weights" + (f", {len(bad)} not as decoded here, as {bad[0]}" if bad else ""))


def judge(run, folder, d, want, key, *words):
    """`moq logits` of a folder against logits in float64: (good enough, the figure, the median of tokens)."""
    out = d + "/logits.safetensors"
    run("logits", folder, "--tokens", d + "/inputs.json#eval", "--out", out, "--backend", "cpu", "--threads", "1", *words)
    rms, median = distance(load_file(out)["logits"].double(), want)
    # An input that F32 and float64 round to different codes moves a token as much as rounding does, so most tokens are judged, not all.
    return rms < 1e-5 if key == "wide" else median < 1e-4, f"relative rms {rms:.2g}, median of tokens {median:.2g}", median


def on_ties(t):
    """The first token's attention returns its value as the cache rounded it. Where o_proj's inputs have the same largest number as the
    values, their scales are in one of these ratios, and rounded values lie just between two codes of those inputs: the last bit decides."""
    for name, s in t.items():
        of = name.replace("v_proj.v_scale", "o_proj.input_scale")
        if of != name and of in t and any(abs(float(s.double() / t[of].double()) - x) < 1e-5 for x in (6, 1, 127 / 448)):
            return True
    return False


def examine(c, d, tokens, run, fnv, report, name):
    exported = d + "/exported"
    want, moves, layers, wrong = reference(exported, d + "/reference", tokens)
    look(run, exported, hashes_of(layers, fnv), report, name)
    if wrong:
        report.note(f"{name}: logits, quantize", f"transformers does not load what ModelOpt wrote: {wrong[0]}")
        return
    for key, logits in want.items():
        try:
            words = "--act", "wide" if key == "wide" else "stored", "--kv", "auto" if key == "stored_kv" else "wide"
            ok, figure, _ = judge(run, exported, d, logits, key, *words)
        except RuntimeError as e:
            report.check(f"{name}: {key}", False, e)
            continue
        if not ok and key == "stored_kv" and on_ties(load_folder(exported)):
            report.note(f"{name}: {key}", figure + "; rounded values lie between two codes of o_proj's inputs")
        elif not ok and moves.get(key, 0) > 1e-4:  # an early layer rounds to another code, and all tokens hear of it
            report.note(f"{name}: {key}", f"{figure}; errors as those of F32 move the reference itself by {moves[key]:.2g}")
        else:
            report.check(f"{name}: {key}", ok, figure)
    quantize(c, d, run, report, name)


def quantize(c, d, run, report, name):
    # ModelOpt's patterns are matched with names in memory, moq's with those on disk
    def on_disk(pattern):
        return pattern.replace("mlp", "block_sparse_moe").replace("down_proj", "w2") if c["family"] == "mixtral" else pattern

    words = ["--recipe", c["recipe"]] + (["--kv", c["kv"]] if c["kv"] else []) + (["--shard", "150K"] if c["shard"] else [])
    for e in c["exclude"]:
        words += ["--exclude", on_disk(e)]
    if c["rule"]:
        words += ["--rule", f"{on_disk(c['rule'][0])}={c['rule'][1]}"]
    if os.path.exists(d + "/calibration.safetensors"):
        words += ["--calibration", d + "/calibration.safetensors"]
    try:
        run("quantize", d + "/src", d + "/quantized", *words)
    except RuntimeError as e:
        if REFUSED in str(e):
            report.note(f"{name}: quantize", f"refused: {e}")
        else:
            report.check(f"{name}: quantize", False, e)
        return
    wrong, bad, count, total = compare_folders(d + "/quantized", d + "/exported")
    share, why = KNOWN.get(c["recipe"], (0, ""))
    figure = f"{count} of {total} bytes differ" + (f", as in {bad[0]}" if bad else "") + "".join("; " + x for x in wrong[:4])
    moved = wrong and all("shared_expert" in x and "only ours" in x for x in wrong)
    if bad and moved and all("post_attention_layernorm" in x for x in bad):
        report.note(f"{name}: quantize", f"{figure}: ModelOpt moves the vector of the shared expert into a norm that the other experts read too")
    elif bad and not wrong and count <= share * total:
        report.note(f"{name}: quantize", f"{figure}: {why}")
    else:
        report.check(f"{name}: quantize", not bad and not wrong, figure)


def arguments(count, kind, families, others):
    """COUNT, SEED, and the families and others that were named, or all of each."""
    count, seed, names = int(sys.argv[2]) if len(sys.argv) > 2 else count, sys.argv[3] if len(sys.argv) > 3 else "1", sys.argv[4:]
    for name in names:
        if name not in families and name not in others:
            sys.exit(f"{name}: neither a family nor a {kind}; there are {' '.join(families)}, {' '.join(others)}")
    return count, seed, [n for n in names if n in families] or list(families), [n for n in names if n in others] or list(others)


def examine_all(cases, build, examine, tool):
    """Each case, a draw and its name, in a folder of its own that is gone afterwards. What `tool` declines to make is a note. The exit code."""
    report, run = Report(), runner(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        fnv, d = Hash(folder), f"{folder}/case"
        for c, name in cases:
            os.makedirs(d)
            try:
                made = build(c, d)
            except Exception as e:
                if not declined(e):
                    raise
                report.note(name, f"{tool} makes no such folder: {type(e).__name__}: {' '.join(str(e).split())[:120]}")
            else:
                try:
                    examine(c, d, made, run, fnv, report, name)
                except Exception as e:
                    report.check(name, False, f"{type(e).__name__}: {str(e)[:300]}")
            shutil.rmtree(d)
    print(f"{report.notes} notes")
    print(f"{report.passed} passed, {report.failed} failed")
    return report.failed != 0 or not report.passed


def cases(count, seed, families, recipes):
    for family in families:
        if family != "nemotron_h" and all(n.startswith("mamba") for n in recipes):
            continue
        for i in range(count):
            c = draw(f"{family} {seed} {i}", family, recipes)
            yield c, f"{family} {i} ({title(c)})"


def main():
    chosen = arguments(4, "recipe", FAMILIES, RECIPES)
    try:
        version = import_modelopt()
    except ImportError as e:
        sys.exit(f"no ModelOpt here: {e}")
    print("torch", torch.__version__, "transformers", transformers.__version__, "modelopt", version)
    return examine_all(cases(*chosen), build, examine, "ModelOpt")


if __name__ == "__main__":
    sys.exit(main())
