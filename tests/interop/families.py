#!/usr/bin/env python3
"""Builds random small models of every family with transformers and compares their logits, in float64, with `moq logits`.

    pip install torch transformers
    python3 tests/interop/families.py tools/moq [COUNT [SEED [FAMILY ...]]]

COUNT models a family (8), another set for each SEED (1). Shapes are awkward on purpose: widths that are no multiple of 16, five heads, one
head of keys, windows and contexts shorter than the text, every kind of rope, experts that no power of two counts. A third of the folders
has config.json as transformers writes it, a third as version 4 wrote it, and in a third every key that has the family's own value may be
missing. Gemma 3 and Llama 4 also come inside folders for text and images. Two texts of 70 and of 20 tokens each are compared.
transformers before 5.23 is no reference for all of them: it knows no swiglu_limit, forgets DeepSeek V2's scale of a stretched context, and loses
states of Nemotron-H between chunks. A config that the engine refuses on purpose is counted as refused and named. Ends with "N passed, N failed"; what cannot be tried is said."""
import json, os, random, shutil, subprocess, sys, tempfile, warnings

os.environ["HF_HUB_OFFLINE"] = "1"
warnings.filterwarnings("ignore")
import torch
import transformers
from safetensors.torch import load_file, save_file

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)
LENGTHS = (70, 20)
WORST = 1e-5  # relative rms; the engine adds in F32, and these models are a few layers deep


# ---- configurations

def maybe(r, chance):
    return r.random() < chance


def rope(r, kinds, context=48, theta=None, width=None):
    """One of the kinds, with numbers that matter in a text of 70 tokens."""
    kind = r.choice(kinds)
    p = {"rope_type": kind, "rope_theta": theta or r.choice([100.0, 10000.0, 500000.0])}
    if kind in ("linear", "dynamic"):
        p["factor"] = r.choice([2.0, 4.0, 1.5])
    elif kind == "llama3":
        p.update(factor=r.choice([8.0, 2.0]), low_freq_factor=1.0, high_freq_factor=r.choice([4.0, 2.0]),
                 original_max_position_embeddings=r.choice([16, 64]))
    elif kind == "yarn":
        p.update(factor=r.choice([2.0, 4.0, 40.0]), original_max_position_embeddings=r.choice([16, 32]))
        if maybe(r, .5):
            p.update(beta_fast=r.choice([32.0, 8.0]), beta_slow=r.choice([1.0, 2.0]))
        if maybe(r, .4):
            p["truncate"] = False
        if maybe(r, .4):
            p["attention_factor"] = 1.3
        elif maybe(r, .4):
            p.update(mscale=r.choice([1.0, .707]), mscale_all_dim=r.choice([1.0, .707]))
    elif kind == "longrope":
        p["original_max_position_embeddings"] = context
        p["short_factor"] = [1 + .1 * r.random() for _ in range(width // 2)]
        p["long_factor"] = [1 + 3 * r.random() for _ in range(width // 2)]
        if maybe(r, .3):
            p["attention_factor"] = 1.2
    return p


def base(r):
    heads, kv = r.choice([(4, 4), (4, 1), (6, 2), (8, 2), (5, 5)])
    return dict(
        vocab_size=r.choice([97, 211, 256]), hidden_size=r.choice([64, 96, 72, 120]), num_hidden_layers=r.choice([2, 3, 5]),
        num_attention_heads=heads, num_key_value_heads=kv, head_dim=r.choice([16, 24, 32, 8]), intermediate_size=r.choice([128, 88, 200]),
        max_position_embeddings=r.choice([48, 128, 4096]), rms_norm_eps=r.choice([1e-5, 1e-6, 1e-3]), tie_word_embeddings=maybe(r, .4),
        bos_token_id=1, eos_token_id=2, pad_token_id=0)


def divisible(b):
    """Some classes insist that the heads divide the hidden size, whatever head_dim says."""
    if b["hidden_size"] % b["num_attention_heads"]:
        b["hidden_size"] = b["num_attention_heads"] * b.get("head_dim", 16)
    return b


def without_head_dim(b):
    """Of families whose heads always fill the hidden size."""
    b["hidden_size"] = b["num_attention_heads"] * b.pop("head_dim")
    return b


def window(r):
    """As Qwen has it: the first layers may look at everything."""
    return dict(use_sliding_window=maybe(r, .5), sliding_window=r.choice([8, 20]), max_window_layers=r.choice([0, 1, 2]))


def layer_types(r, b):
    return r.choice([None, [r.choice(["sliding_attention", "full_attention"]) for _ in range(b["num_hidden_layers"])]])


def no_rope_layers(r, b):
    some = [r.choice([0, 1]) for _ in range(b["num_hidden_layers"])]
    return dict(no_rope_layers=r.choice([None, some]), no_rope_layer_interval=r.choice([2, 4]))


def llama(r):
    b = divisible(base(r))
    if maybe(r, .4):
        b["hidden_size"] = b["num_attention_heads"] * b["head_dim"]
        if maybe(r, .5):
            b.pop("head_dim")
    return dict(b, hidden_act=r.choice(["silu", "silu", "gelu", "gelu_pytorch_tanh"]), attention_bias=maybe(r, .5), mlp_bias=maybe(r, .5),
                rope_parameters=rope(r, ["default", "linear", "llama3", "yarn", "dynamic"]))


def mistral(r):
    return dict(base(r), hidden_act=r.choice(["silu", "silu", "gelu", "gelu_pytorch_tanh"]), sliding_window=r.choice([None, 7, 16]),
                rope_parameters=rope(r, ["default", "yarn"]))


def mixtral(r):
    return dict(base(r), num_local_experts=r.choice([3, 8]), num_experts_per_tok=r.choice([1, 2, 3]), sliding_window=r.choice([None, 9]),
                rope_parameters=rope(r, ["default"]))


def qwen2(r):
    b = without_head_dim(base(r))
    return dict(b, **window(r), rope_parameters=rope(r, ["default", "yarn", "linear"]))


def qwen3(r):
    b = base(r)
    return dict(b, **window(r), attention_bias=maybe(r, .5), rope_parameters=rope(r, ["default", "yarn"]))


def qwen3_moe(r):
    b = base(r)
    return dict(b, attention_bias=maybe(r, .3), num_experts=r.choice([4, 6, 9]), num_experts_per_tok=r.choice([1, 2, 4]),
                moe_intermediate_size=r.choice([24, 40]), norm_topk_prob=maybe(r, .5), decoder_sparse_step=r.choice([1, 1, 2]),
                mlp_only_layers=r.choice([[], [0], [b["num_hidden_layers"] - 1]]), use_sliding_window=maybe(r, .4), sliding_window=9,
                rope_parameters=rope(r, ["default", "yarn"]))


def phi3(r):
    b = base(r)
    head = b["head_dim"]
    b = without_head_dim(b)
    part = r.choice([1.0, .5, .75])
    if int(head * part) % 2:
        part = 1.0
    original = r.choice([32, 64])
    b["max_position_embeddings"] = original * r.choice([1, 4])
    p = rope(r, ["default", "longrope", "longrope"], context=original, width=int(head * part))
    p["partial_rotary_factor"] = part
    return dict(b, original_max_position_embeddings=original, sliding_window=r.choice([None, 11]), rope_parameters=p)


def gemma2(r):
    b = divisible(base(r))
    b["tie_word_embeddings"] = True
    return dict(b, query_pre_attn_scalar=r.choice([16, 40, 144]), sliding_window=r.choice([5, 12]), attention_bias=maybe(r, .3),
                final_logit_softcapping=r.choice([None, 30.0, 5.0]), attn_logit_softcapping=r.choice([None, 50.0, 2.0]),
                hidden_activation=r.choice(["gelu_pytorch_tanh", "gelu"]), rope_parameters=rope(r, ["default"]))


def gemma3(r):
    b = divisible(base(r))
    both = {"full_attention": rope(r, ["default", "linear"], theta=1e6), "sliding_attention": rope(r, ["default"], theta=1e4)}
    return dict(b, query_pre_attn_scalar=r.choice([16, 40]), sliding_window=r.choice([5, 12]), layer_types=layer_types(r, b),
                final_logit_softcapping=r.choice([None, 9.0]), attn_logit_softcapping=r.choice([None, 4.0]), rope_parameters=both)


def gpt_oss(r):
    b = base(r)
    return dict(b, num_local_experts=r.choice([3, 8]), num_experts_per_tok=r.choice([1, 2, 3]), sliding_window=r.choice([6, 20]),
                swiglu_limit=r.choice([7.0, 1.0]), layer_types=layer_types(r, b), attention_bias=maybe(r, .8),
                rope_parameters=rope(r, ["default", "yarn"]))


def smollm3(r):
    b = base(r)
    return dict(b, **no_rope_layers(r, b), attention_bias=maybe(r, .3), mlp_bias=maybe(r, .3), use_sliding_window=maybe(r, .4),
                sliding_window=8, rope_parameters=rope(r, ["default", "yarn"]))


def llama4(r):
    b = base(r)
    return dict(b, **no_rope_layers(r, b), intermediate_size_mlp=r.choice([80, 104]), num_local_experts=r.choice([2, 5]),
                num_experts_per_tok=r.choice([1, 2]), interleave_moe_layer_step=r.choice([1, 2]), moe_layers=r.choice([None, [0]]),
                use_qk_norm=maybe(r, .5), attention_chunk_size=r.choice([16, 11, 4096]), attn_temperature_tuning=maybe(r, .6),
                floor_scale=r.choice([8, 30]), attn_scale=r.choice([.1, .4]), attention_bias=maybe(r, .3),
                rope_parameters=rope(r, ["default", "llama3"]))


def latent(r):
    """What DeepSeek V2 and V3 share: attention over a latent cache, shared experts, dense first layers."""
    b = base(r)
    b.pop("head_dim")
    b["num_key_value_heads"] = b["num_attention_heads"]
    return dict(b, q_lora_rank=r.choice([None, 24, 40]), kv_lora_rank=r.choice([32, 20]), qk_nope_head_dim=r.choice([16, 24]),
                qk_rope_head_dim=r.choice([8, 16]), v_head_dim=r.choice([16, 20]), moe_intermediate_size=r.choice([24, 40]),
                n_shared_experts=r.choice([1, 2]), routed_scaling_factor=r.choice([1.0, 2.5]), attention_bias=maybe(r, .3),
                first_k_dense_replace=r.choice([0, 1, 2]), hidden_act="silu", rope_parameters=rope(r, ["default", "yarn"]))


def deepseek_v2(r):
    b = divisible(latent(r))
    if maybe(r, .5):
        b.update(topk_method="greedy", n_group=1, topk_group=1, n_routed_experts=6, num_experts_per_tok=r.choice([1, 3]))
    else:
        b.update(topk_method="group_limited_greedy", n_group=4, topk_group=r.choice([1, 2]), n_routed_experts=8, num_experts_per_tok=2)
    return dict(b, norm_topk_prob=False)


def deepseek_v3(r):
    groups, top, experts = r.choice([(4, 2, 8), (1, 1, 5), (2, 1, 12)])
    return dict(latent(r), n_group=groups, topk_group=top, n_routed_experts=experts, num_experts_per_tok=r.choice([1, 2, 3]),
                norm_topk_prob=maybe(r, .6), rope_interleave=maybe(r, .7))


def nemotron_h(r):
    b = base(r)
    b.pop("num_hidden_layers")
    b["layer_norm_epsilon"] = b.pop("rms_norm_eps")
    kinds = ["linear_attention", "full_attention"]
    kinds += [r.choice(["linear_attention", "full_attention", "mlp", "moe"]) for _ in range(r.choice([2, 4]))]
    groups, top, experts = r.choice([(4, 2, 8), (1, 1, 6)])
    return dict(b, layers_block_type=kinds, attention_bias=maybe(r, .3), mlp_bias=maybe(r, .3), use_bias=maybe(r, .3),
                mamba_proj_bias=maybe(r, .3), use_conv_bias=maybe(r, .7), ssm_state_size=r.choice([16, 24]),
                mamba_num_heads=r.choice([4, 8]), mamba_head_dim=r.choice([8, 16]), n_groups=r.choice([1, 2, 4]),
                conv_kernel=r.choice([4, 3]), chunk_size=r.choice([16, 128]), time_step_min=r.choice([0.001, 0.2]), n_group=groups,
                topk_group=top, n_routed_experts=experts, n_shared_experts=1, moe_intermediate_size=r.choice([24, 40]),
                moe_shared_expert_intermediate_size=r.choice([48, 32]), moe_latent_size=r.choice([None, 32]),
                num_experts_per_tok=r.choice([1, 2, 3]), routed_scaling_factor=r.choice([1.0, 2.5]), norm_topk_prob=maybe(r, .6))


FAMILIES = {  # the function, and what transformers calls the classes
    "llama": (llama, "LlamaConfig", "LlamaForCausalLM"),
    "mistral": (mistral, "MistralConfig", "MistralForCausalLM"),
    "mixtral": (mixtral, "MixtralConfig", "MixtralForCausalLM"),
    "qwen2": (qwen2, "Qwen2Config", "Qwen2ForCausalLM"),
    "qwen3": (qwen3, "Qwen3Config", "Qwen3ForCausalLM"),
    "qwen3_moe": (qwen3_moe, "Qwen3MoeConfig", "Qwen3MoeForCausalLM"),
    "phi3": (phi3, "Phi3Config", "Phi3ForCausalLM"),
    "gemma2": (gemma2, "Gemma2Config", "Gemma2ForCausalLM"),
    "gemma3": (gemma3, "Gemma3TextConfig", "Gemma3ForCausalLM"),
    "gpt_oss": (gpt_oss, "GptOssConfig", "GptOssForCausalLM"),
    "smollm3": (smollm3, "SmolLM3Config", "SmolLM3ForCausalLM"),
    "llama4": (llama4, "Llama4TextConfig", "Llama4ForCausalLM"),
    "deepseek_v2": (deepseek_v2, "DeepseekV2Config", "DeepseekV2ForCausalLM"),
    "deepseek_v3": (deepseek_v3, "DeepseekV3Config", "DeepseekV3ForCausalLM"),
    "nemotron_h": (nemotron_h, "NemotronHConfig", "NemotronHForCausalLM"),
}
WRAPPED = {"gemma3": ("gemma3", "vision_tower"), "llama4": ("llama4", "vision_model")}  # the outer model_type, a tensor of the other half

# Keys whose value may be the family's own: set to it in SILENT cases, so that they may be left out.
OWN = """rms_norm_eps layer_norm_epsilon hidden_act hidden_activation attention_bias mlp_bias norm_topk_prob routed_scaling_factor
    attn_logit_softcapping final_logit_softcapping query_pre_attn_scalar swiglu_limit attn_temperature_tuning floor_scale attn_scale
    use_qk_norm n_shared_experts time_step_min conv_kernel tie_word_embeddings topk_method""".split()
# Keys that are left out where they have the family's own value.
OPTIONAL = OWN + """mlp_hidden_act first_k_dense_replace swiglu_alpha time_step_limit n_groups rope_interleave no_rope_layer_interval
    no_rope_layers interleave_moe_layer_step moe_layers decoder_sparse_step mlp_only_layers use_sliding_window max_window_layers
    sliding_window layer_types _sliding_window_pattern sliding_window_pattern n_group topk_group use_conv_bias use_bias
    num_experts_per_tok mamba_proj_bias attention_chunk_size head_dim num_key_value_heads moe_latent_size scoring_func num_local_experts
    num_experts moe_intermediate_size max_position_embeddings""".split()
# Without these the engine refuses: their defaults in transformers are one model's, no property of the family.
NEEDED = {"mixtral": ("num_local_experts", "num_experts_per_tok"), "llama4": ("num_local_experts", "num_experts_per_tok")}


# ---- folders

def take_defaults(config, r):
    own = type(config)()
    for key in OWN:
        if hasattr(config, key) and hasattr(own, key) and maybe(r, .8):
            setattr(config, key, getattr(own, key))
    theta, p = getattr(type(config), "default_theta", None), getattr(config, "rope_parameters", None)
    if theta and p and "rope_theta" in p and p.get("rope_type") == "default":
        p["rope_theta"] = theta


def leave_out(c, config, r):
    """Every optional key with the family's own value, nearly; returns those that are gone."""
    own, gone, p = type(config)().to_dict(), [], c.get("rope_parameters")
    theta = getattr(type(config), "default_theta", None) if config.model_type != "gpt_oss" else None  # absent means YaRN there
    if p and p.get("rope_type") == "default" and set(p) <= {"rope_type", "rope_theta"} and p["rope_theta"] == theta:
        c.pop("rope_parameters")
        gone.append("rope_parameters")
    for key in OPTIONAL:
        if key in c and key in own and c[key] == own[key] and maybe(r, .8):
            c.pop(key)
            gone.append(key)
    for key in [k for k in c if c[k] is None and own.get(k) is None]:  # elsewhere null is said
        c.pop(key)
    return gone


def as_version_4(c, r):
    """rope_theta, rope_scaling and partial_rotary_factor beside each other, Gemma 3's second theta under its old name."""
    p = c.pop("rope_parameters", None)
    if not p:
        return
    if "full_attention" in p:
        c["rope_local_base_freq"] = p["sliding_attention"]["rope_theta"]
        p = p["full_attention"]
    p = dict(p)
    c["rope_theta"] = p.pop("rope_theta", 10000.0)
    if "partial_rotary_factor" in p:
        c["partial_rotary_factor"] = p.pop("partial_rotary_factor")
    if c["model_type"] == "phi3":  # stands outside there
        p.pop("original_max_position_embeddings", None)
    if p.get("rope_type") == "default":
        c["rope_scaling"] = None
        return
    if maybe(r, .5):
        p["type"] = p.pop("rope_type")
    c["rope_scaling"] = p


def wrap(folder, family, c, r):
    """The text model as half of a model of text and images, named in either of two ways."""
    outer, other = WRAPPED[family]
    inside = maybe(r, .5)
    tensors = {}
    for name, t in load_file(folder + "/model.safetensors").items():
        if not inside:
            name = "language_model." + name
        elif name.startswith("model."):
            name = name.replace("model.", "model.language_model.", 1)
        tensors[name] = t
    tensors[other + ".x.weight"] = torch.zeros(3, 3)
    save_file(tensors, folder + "/model.safetensors")
    # numbers of the other half that must not be taken for the text model's
    vision = {"hidden_size": 3, "num_hidden_layers": 27, "rope_theta": 77}
    return {"model_type": outer, "text_config": c, "vision_config": vision, "tie_word_embeddings": c.get("tie_word_embeddings")}


def fill(model, seed):
    """Weights large enough that every part moves the logits, norms and steps that lie near what they are in real models."""
    g = torch.Generator().manual_seed(seed)
    zero_centred = type(model).__name__.startswith("Gemma")  # the norm multiplies by 1 + w
    named = list(model.named_parameters()) + [(n, b) for n, b in model.named_buffers() if "e_score_correction_bias" in n]
    for name, p in named:
        x = torch.randn(p.shape, generator=g)
        if "A_log" in name:
            x = torch.log(torch.arange(1, p.numel() + 1).float()).reshape(p.shape) + .1 * x
        elif "dt_bias" in name:
            x = x * .5 - 1
        elif name.endswith(".D"):
            x = 1 + .3 * x
        elif "e_score" in name:
            x = x * .1
        elif "conv1d.weight" in name:
            x = x * .4
        elif "norm" in name and "bias" not in name:
            x = .3 * x + (0 if zero_centred else 1)
        elif "bias" in name or "sinks" in name:
            x = x * .5
        elif "embed" not in name:
            x = x * (1.3 / p.shape[-1] ** .5)
        with torch.no_grad():
            p.copy_(x)


def build(folder, family, r, seed):
    """Writes the folder, the tokens and the reference logits; returns what was done to config.json and the keys that are gone."""
    make, config_class, model_class = FAMILIES[family]
    style = r.choice(["as saved", "version 4", "silent"])
    config = getattr(transformers, config_class)(**make(r))
    if style == "silent":
        take_defaults(config, r)
    config._attn_implementation = config._experts_implementation = "eager"
    model = getattr(transformers, model_class)(config).eval()
    fill(model, seed)
    model.save_pretrained(folder)
    with open(folder + "/config.json") as f:
        c = json.load(f)
    gone = leave_out(c, config, r) if style == "silent" else []
    if style == "version 4":
        as_version_4(c, r)
    if style != "version 4" and family in WRAPPED and maybe(r, .4):
        c = wrap(folder, family, c, r)
        style += ", wrapped"
    with open(folder + "/config.json", "w") as f:
        json.dump(c, f, indent=1)
    model = model.double()
    for length in LENGTHS:
        ids = [[r.randrange(config.vocab_size) for _ in range(length)] for _ in range(2)]
        with torch.no_grad():  # row by row and without a cache: no padding, no mask of a batch
            logits = torch.cat([model(torch.tensor([row]), use_cache=False).logits for row in ids])
        with open(f"{folder}/ids{length}.json", "w") as f:
            json.dump(ids, f)
        save_file({"logits": logits.contiguous()}, f"{folder}/reference{length}.safetensors")
    return style, gone


# ---- comparing

def relative(moq, folder, length):
    """Relative rms, and the first position of each row that is clearly wrong."""
    out = folder + "/made/out.safetensors"  # moq writes over no file of a folder that it reads
    os.makedirs(folder + "/made", exist_ok=True)
    r = subprocess.run([moq, "logits", folder, "--tokens", f"{folder}/ids{length}.json", "--out", out, "--backend", "cpu", "--act", "wide",
                        "--kv", "wide", "--threads", "1"], capture_output=True, text=True)
    if r.returncode:
        raise RuntimeError(r.stderr.strip())
    a, b = load_file(out)["logits"].double(), load_file(f"{folder}/reference{length}.safetensors")["logits"]
    by_token = ((a - b).pow(2).mean(-1) / b.pow(2).mean(-1)).sqrt()
    first = [next((i for i, e in enumerate(row) if not e < 1e-4), None) for row in by_token.tolist()]
    return ((a - b).norm() / b.norm()).item(), first


def main():
    moq, count, seed = os.path.abspath(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 8, sys.argv[3] if len(sys.argv) > 3 else "1"
    print("torch", torch.__version__, "transformers", transformers.__version__)
    passed = failed = refused = 0
    for family in sys.argv[4:] or FAMILIES:
        if family not in FAMILIES:
            sys.exit(f"{family}: no family; there are {' '.join(FAMILIES)}")
        _, config_class, model_class = FAMILIES[family]
        if not hasattr(transformers, config_class) or not hasattr(transformers, model_class):
            print(f"       {family}: not in this transformers")
            continue
        worst, compared = 0.0, 0
        for i in range(count):
            name, r, folder = f"{family} {i}", random.Random(f"{family} {seed} {i}"), tempfile.mkdtemp()
            try:
                try:
                    style, gone = build(folder, family, r, i)
                except ValueError as e:  # what its validation raises; anything else is a mistake of this script
                    print(f"       {name}: transformers makes no such model: {type(e).__name__}: {' '.join(str(e).split())[:160]}", flush=True)
                    continue
                missing = [key for key in NEEDED.get(family, ()) if key in gone]
                for length in LENGTHS:
                    try:
                        error, first = relative(moq, folder, length)
                    except RuntimeError as e:
                        if missing and any(key in str(e) for key in missing):
                            refused += 1
                            print(f"       {name}: refused without {', '.join(missing)}", flush=True)
                            break
                        failed += 1
                        print(f"FAILED {name} ({style}), {length} tokens: {e}", flush=True)
                        continue
                    compared += 1
                    worst = max(worst, error)
                    passed += error < WORST
                    if not error < WORST:
                        failed += 1
                        print(f"FAILED {name} ({style}), {length} tokens: relative rms {error:.2g}, wrong from {first} on", flush=True)
                        if gone:
                            print("       config.json has no " + " ".join(gone))
            finally:
                shutil.rmtree(folder)
        print(f"{family}: {compared} texts compared, relative rms at most {worst:.2g}", flush=True)
    print(f"{refused} configs refused on purpose")
    print(f"{passed} passed, {failed} failed")
    return failed != 0 or not passed


if __name__ == "__main__":
    sys.exit(main())
