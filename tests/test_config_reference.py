from megatron_pmd.config import RunConfig, known_keys
from tools.write_config_reference import TARGET, models_in, reference


def test_the_committed_page_is_what_the_docstrings_say():
    assert TARGET.read_text() == reference(), "stale: run `make docs`"


def test_every_key_that_takes_a_value_has_a_line_of_its_own():
    page = reference()
    groups = {
        key for key in known_keys(RunConfig) if any(k.startswith(key + ".") for k in known_keys(RunConfig))
    }
    for key in set(known_keys(RunConfig)) - groups:
        assert f"| `{key}`" in page
    assert groups >= {name for name, field in RunConfig.model_fields.items() if models_in(field.annotation)}


def test_bounds_and_defaults_are_written_as_the_command_line_takes_them():
    page = reference()
    assert "| `rollout.top_p` | number, > 0, ≤ 1 | `1.0` |" in page
    assert "| `data.shuffle`" not in page
    assert "| `reward.length.warmup_iterations` | integer, ≥ 0 | `0` |" in page
    assert "| `layout.expert_tensor` | integer, > 0 or null | `null` |" in page
    assert "| `batch.prompts_per_rollout` | integer, > 0 | required |" in page
