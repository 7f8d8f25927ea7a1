#!/usr/bin/env python3
"""Changes every key of config.json, one at a time, and sees whether `moq logits` follows what transformers makes of it.

    pip install torch transformers
    python3 tests/interop/keys.py tools/moq [SEED [FAMILY ...]]

One random model a family (families.py). Each key gets other values of its type, or is left out; keys of other families are added. A value that
moves the logits of transformers must move those of moq to the same place, or be refused: anything else is a model that is run wrong in silence.
Keys that one of the two passes over on purpose stand in PASSED_OVER. Ends with "N passed, N failed"."""
import copy, json, os, random, shutil, subprocess, sys, tempfile, traceback
import torch
import transformers
import families
from safetensors.torch import load_file

LENGTH = 40
NAMES = {  # values of keys that hold a word
    "hidden_act": ["relu", "relu2", "gelu_new", "gelu", "quick_gelu", "tanh", "gelu_pytorch_tanh", "silu"],
    "hidden_activation": ["relu", "relu2", "gelu", "silu"], "mlp_hidden_act": ["relu", "silu", "gelu"], "mamba_hidden_act": ["relu", "gelu"],
    "scoring_func": ["softmax", "sigmoid"], "topk_method": ["greedy", "noaux_tc", "group_limited_greedy"]}
MORE = {  # keys that a folder may have beside those of its family
    "is_causal": [False], "use_bidirectional_attention": [True], "use_qk_norm": [True, False], "head_dim": [8], "use_sliding_window": [True],
    "rope_theta": [77.0], "norm_topk_prob": [True, False], "routed_scaling_factor": [.1], "no_rope_layers": [[1, 0, 1, 0, 1]],
    "swiglu_alpha": [1.0], "swiglu_limit": [1.0], "first_k_dense_replace": [1], "moe_layer_freq": [2], "pretraining_tp": [2],
    "rope_scaling": [{"type": "linear", "factor": 3.0}, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
                     {"rope_type": "dynamic", "factor": 2.0}, {"rope_type": "proportional", "factor": 2.0}]}
# A bias, or a tensor of another kind, that lies in the folder is used by moq whatever config.json says of it; lengths that a window of 0 or a
# second mention of the original context would give are nobody's; transformers passes over the factors of routing that DeepSeek V2's own code has.
PASSED_OVER = ("attention_bias", "mlp_bias", "use_bias", "use_conv_bias", "original_max_position_embeddings", "norm_topk_prob",
               "routed_scaling_factor", "time_step_limit", "use_sliding_window")
SKIPPED = ("transformers_version", "architectures", "model_type", "vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "dtype")


def others(key, v):
    if key in NAMES:
        return [x for x in NAMES[key] if x != v]
    if isinstance(v, bool):
        return [not v]
    if isinstance(v, int):
        return [v + 1, max(1, v // 2), v * 2]
    return [v * 2 + .01, v / 3] if isinstance(v, float) else []


def changes(c):
    """What is changed, and config.json afterwards."""
    for key in c:
        if key in SKIPPED:
            continue
        yield key + " left out", {k: v for k, v in c.items() if k != key}
        for v in others(key, c[key]):
            yield f"{key} {v}", dict(c, **{key: v})
    for key, list_of in MORE.items():
        for v in list_of:
            m = dict(c, **{key: v})
            if key == "rope_scaling":
                m.pop("rope_parameters", None)
            if c.get(key) != v:
                yield f"{key} {v}", m
    for key, v in (c.get("rope_parameters") or {}).items():
        for x in others(key, v):
            m = copy.deepcopy(c)
            m["rope_parameters"][key] = x
            yield f"rope_parameters {key} {x}", m


def logits_of(model, ids):
    with torch.no_grad():
        return torch.cat([model(torch.tensor([row]), use_cache=False).logits for row in ids])


def loaded(model_class, folder, ids):
    """Logits of the folder, and None; or None, and why transformers does not load all of it, or does not run it."""
    try:
        model, info = model_class.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager",
                                                  output_loading_info=True)
        if info["missing_keys"] or info["mismatched_keys"]:
            return None, "tensors are missing or of other shapes"
        return logits_of(model.eval().double(), ids), None
    except Exception as e:
        if traceback.extract_tb(e.__traceback__)[-1].filename == __file__:  # raised here, not by the library
            raise
        return None, f"{type(e).__name__}: {' '.join(str(e).split())[:100]}"


def moq_logits(moq, folder):
    """None: refused, which is exit code 2 and nothing else."""
    out = folder + "/made/out.safetensors"
    r = subprocess.run([moq, "logits", folder, "--tokens", folder + "/ids.json", "--out", out, "--backend", "cpu", "--act", "wide", "--kv", "wide",
                        "--threads", "1"], capture_output=True, text=True)
    if r.returncode not in (0, 2):
        raise RuntimeError(f"moq ends with {r.returncode}: {r.stderr[-200:]}")
    return None if r.returncode else load_file(out)["logits"].double()


def one_family(moq, seed, family):
    """Values that were followed or passed over by both, refused values, and what was run wrong."""
    make, config_class, model_class = families.FAMILIES[family]
    r, model = random.Random(f"{family} {seed}"), None
    while model is None:
        try:
            config = getattr(transformers, config_class)(**make(r))
            config._attn_implementation = config._experts_implementation = "eager"
            model = getattr(transformers, model_class)(config).eval()
        except ValueError:  # what its validation raises
            pass
    families.fill(model, 3)
    folder, good, refused, wrong = tempfile.mkdtemp(), 0, 0, []
    try:
        model.save_pretrained(folder)
        os.mkdir(folder + "/made")
        with open(folder + "/config.json") as f:
            c = json.load(f)
        ids = [[r.randrange(config.vocab_size) for _ in range(LENGTH)] for _ in range(2)]
        with open(folder + "/ids.json", "w") as f:
            json.dump(ids, f)
        plain = logits_of(model.double(), ids)
        for what, m in [("nothing", c)] + list(changes(c)):
            with open(folder + "/config.json", "w") as f:
                json.dump(m, f)
            try:
                got = moq_logits(moq, folder)
            except RuntimeError as e:
                wrong.append(f"{what}: {e}")
                continue
            refused += got is None
            want, why = loaded(getattr(transformers, model_class), folder, ids) if got is not None else (None, "refused by moq")
            if want is not None and not torch.isfinite(want).all():
                want, why = None, "no finite logits"
            if want is None:
                if what == "nothing":  # what is unchanged must agree, so that each family has something that does
                    wrong.append(f"nothing changed: {why}")
                elif got is not None:
                    print(f"    {family}, {what}: not run by transformers: {why}")
                continue
            apart, moved = ((a - b).norm() / b.norm() for a, b in ((got, want), (want, plain)))
            if apart < families.WORST:
                good += 1
            elif not any(key in what.split() for key in PASSED_OVER):
                wrong.append(f"{what}: moves transformers by {moved:.2g}, moq is {apart:.2g} away")
    finally:
        shutil.rmtree(folder)
    return good, refused, wrong


def main():
    moq, seed = os.path.abspath(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "1"
    print("torch", torch.__version__, "transformers", transformers.__version__)
    passed = failed = 0
    for family in sys.argv[3:] or families.FAMILIES:
        good, refused, wrong = one_family(moq, seed, family)
        passed, failed = passed + good, failed + len(wrong)
        for line in wrong:
            print(f"FAILED {family}, {line}")
        print(f"{family}: {good} values agree, {refused} are refused", flush=True)
    print(f"{passed} passed, {failed} failed")
    return failed != 0 or not passed


if __name__ == "__main__":
    sys.exit(main())
