"""One test text of a finished run, from text to score, with everything between and its shape."""

from nla_ray.cluster.job import run_job


def body(run) -> None:
    from nla_ray.activation.stage import captured_ids, load_activations
    from nla_ray.activation.vectors import norm
    from nla_ray.base.load import load_backbone, load_tokenizer
    from nla_ray.base.prompts import injection_prompt
    from nla_ray.description.verbalizer import Verbalizer
    from nla_ray.label.stage import activation_subjects, drawn_labels
    from nla_ray.reinforce.rewards import contrast
    from nla_ray.score.reconstructor import Reconstructor
    from nla_ray.score.scorer import compare

    base, captured = run.config.base, load_activations(run, "test")
    tokenizer, model = load_tokenizer(base), load_backbone(base)
    text_id, text = captured.text_ids[0], captured.texts[0]
    print(f" 1. text {text_id}, {len(text)} characters\n{text}\n")
    ids, positions = captured_ids(run, [text_id])[text_id], captured.positions[:1]
    print(f" 2. chat prompt: {len(ids)} ids, wanted positions {positions}")
    v = captured.vectors[:1]
    print(f" 3. activation v at layer {base.layer}: {list(v.shape)}, norm {norm(v).item():.1f}")
    [subject] = activation_subjects(run, captured.select([0]))
    print(f" 4. label:\n{drawn_labels(run, 'test').get(subject, '(none)')}\n")
    prompt = injection_prompt(tokenizer, base)
    ids = prompt.encode(0, model.get_input_embeddings().num_embeddings)
    print(f" 5. v as a token at norm {base.injection_norm:g}, id {max(ids)}: {ids}")
    arm = run.config.grpo.artifact
    print(f" 6. SFT, then GRPO: adapter {arm}")
    with run.local_copy(arm, run.require(arm), "adapter") as folder:
        verbalizer = Verbalizer.load(base, folder, model=model)
    [said] = verbalizer.describe(
        captured.injected[:1], max_new_tokens=run.config.grpo.max_new_tokens
    )
    print(f" 7. description, {said.num_sampled} tokens:\n{said.text}\n")
    with run.local_copy("judge_scorer", run.require("judge_scorer")) as folder:
        judge = Reconstructor.load(base, folder)
    r = judge.reconstruct([said.text])
    print(f" 8. reconstruction r by the judge: {list(r.shape)}, norm {norm(r).item():.2f}")
    scores = compare(r, v, captured.vectors[None, -8:], judge.mean.cpu())
    right, wrong = scores.centred_right, scores.centred_wrong
    print(f" 9. centred cosine with v: {right.item():.3f}; with 8 others: {wrong.mean():.3f}")
    paid = contrast(right, wrong).item()
    print(f"10. contrast {paid:.3f} (the judge's; GRPO pays the reward scorer's)")


if __name__ == "__main__":
    run_job(__doc__, body, ray=False, lock=False)
