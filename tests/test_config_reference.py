from megatron_pmd.config import RunConfig, known_keys
from tools.write_config_reference import TARGET, models_in, reference


def test_the_committed_page_is_what_the_docstrings_say():
    assert TARGET.read_text() == reference(), "stale: run `make docs`"


def test_every_key_that_takes_a_value_has_a_line_of_its_own():
    page, keys = reference(), known_keys(RunConfig)
    groups = {key for key in keys if any(k.startswith(key + ".") for k in keys)}
    for key in set(keys) - groups:
        # a group of a list's entry, as data.train.0.reward, has one line: its settings stand elsewhere
        entry, _, inner = key.partition(".0.")
        shown = f"{entry}.0.{inner.partition('.')[0]}" if inner else key
        assert f"| `{shown}`" in page
    assert groups >= {name for name, field in RunConfig.model_fields.items() if models_in(field.annotation)}


def test_bounds_and_defaults_are_written_as_the_command_line_takes_them():
    page = reference()
    assert "| `rollout.top_p` | number, > 0, ≤ 1 | `1.0` |" in page
    assert "| `data.shuffle`" not in page
    assert "| `reward.length.warmup_iterations` | integer, ≥ 0 | `0` |" in page
    assert "| `layout.expert_tensor` | integer, > 0 or null | `null` |" in page
    assert "| `batch.prompts_per_rollout` | integer, > 0 | required |" in page
