"""DuoAttention: the masks, the gates' training step, and deployment with heads of two kinds."""

import jax
import numpy as np

from parity import in_order, streamingllm
from seqlab.interop.convert import convert
from seqlab.kernels.attention.reference import visible
from seqlab.models import Full
from seqlab.models.attention import with_cache
from seqlab.models.cache import duo
from seqlab.models.duo import duo_loss, two_streams


def check(case):
    if "items" in case.meta:
        for i, item in enumerate(case.meta["items"]):
            case.check(
                f"mask{i}",
                _mask(case.expected(f"mask{i}").shape[0], item["sink"], item["recent"]),
                exact=True,
            )
    elif "alpha" in case.inputs:
        _check_training(case)
    else:
        _check_deployment(case)


def _mask(side, sinks, window):
    i = np.arange(side)
    return np.asarray(visible(i[:, None], None, i[None], None, left=window - 1, right=0, sinks=sinks))


def _model(case):
    options, steps = {"rope_theta": 10000.0, **case.meta}, case.inputs["input_ids"].shape[1]
    model = streamingllm.llama(options, Full(steps), case.params)
    return convert(model, case.params, architecture="llama")


def _check_training(case):
    model, options = _model(case), {"sinks": case.meta["sink_size"], "window": case.meta["recent_size"]}
    tokens, labels = case.array("input_ids"), case.array("label_mask")
    full, gated = two_streams(model, case.array("alpha"), tokens, **options)
    case.check_all({"hidden_full": full, "hidden_duo": gated})

    def objective(alpha):
        loss = duo_loss(model, alpha, tokens, labels, **options, weight=case.meta["reg_weight"])
        return loss.total, loss

    (_, loss), gradient = jax.value_and_grad(objective, has_aux=True)(case.array("alpha"))
    case.check_all(
        {
            "loss": loss.total,
            "distill_loss": loss.distill,
            "reg_loss": loss.regularizer,
            "grad_alpha": gradient,
        }
    )
    if "streaming_mask" in case.mids:
        case.check("streaming_mask", _mask(case.meta["T"], *options.values()), exact=True)


def _check_deployment(case):
    """The original lets streaming heads see all of a call, and lists full heads before streaming ones."""
    sinks, recent = case.meta["sink_size"], case.meta["recent_size"]
    kept = case.inputs["full_head_mask"] > 0.5
    tokens = case.array("input_ids")
    options = {"capacity": tokens.shape[1], "sinks": sinks, "window": recent + 1, "edge": "call"}
    model = with_cache(_model(case), [duo(row, **options) for row in kept])

    def call(tokens, state):
        x, state = model.features(tokens, state)
        return x, model.read_out(x), state

    run, state, results, lengths, begin = jax.jit(call), model.init_state(len(tokens)), [], [], 0
    for size in case.meta["chunks"]:
        *result, state = run(tokens[:, begin : begin + size], state)
        results.append(result)
        begin += size
        lengths.append([begin, min(begin, sinks + recent)])
    case.check("hidden", np.concatenate([hidden for hidden, _ in results], axis=1))
    case.check("logits", np.concatenate([logits for _, logits in results], axis=1))
    case.check("cache_lens_full_streaming", lengths, exact=True)
    for layer, (mixed, _) in enumerate(state):
        for own, wanted in _by_kind(mixed, kept[layer]):
            k, v, _ = in_order(own, sinks, recent if wanted == "streaming" else begin)
            case.check(f"{wanted}_k_layer{layer}", k)
            case.check(f"{wanted}_v_layer{layer}", v)
        for wanted in ("full", "streaming"):  # the original has arrays without heads for the other kind
            name = f"{wanted}_k_layer{layer}"
            if name in case.outs and name not in case.compared:
                assert case.outs[name].shape[1] == 0, f"layer {layer} has no {wanted} heads"
                case.compared |= {name, f"{wanted}_v_layer{layer}"}


def _by_kind(mixed, kept):
    if kept.all() or not kept.any():
        return [(mixed, "full" if kept.all() else "streaming")]
    return [(mixed[0], "full"), (mixed[1], "streaming")]
