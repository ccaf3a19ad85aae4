"""A look at a base before training: its marker, its norms, the ceiling of each layer, a preset."""

from nla_ray.cluster.job import run_job


def body(run) -> None:
    from nla_ray.base.families import check_context
    from nla_ray.base.load import load_model_config
    from nla_ray.run.stages import INSPECTION_NAME, make_stages
    from nla_ray.score.ceiling import describe_inspection
    from nla_ray.score.stage import next_command, write_preset
    from nla_ray.settings.preset_file import start_preset

    # What no stage takes is not worth an inspection.
    check_context(load_model_config(run.config.base), run.config.base.max_tokens)
    start = start_preset(run.given.preset)  # now: a file may be gone when the inspection is done
    *_, (_, results) = make_stages(run, "inspect_base", strict=True)
    for line in describe_inspection(results):
        print(line)
    print(f"written to {run.root / INSPECTION_NAME}")
    print(next_command(run, write_preset(run, results, start)))


if __name__ == "__main__":
    run_job(__doc__, body, ray=lambda config: config.capture.needs_answers)
