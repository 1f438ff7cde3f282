"""Updates over the network to servers of others and to an engine node, whose engines die and come back."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_pmd.engine.server import free_port
from tests.actor.launch import launch
from tests.actor.tiny_models import write_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ports() -> list[int]:
    return [free_port(), free_port()]


@pytest.fixture(scope="module")
def updates(ports, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """As the driver saw them."""
    folder = tmp_path_factory.mktemp("servers")
    write_model(folder / "model", "qwen3moe")
    return launch(
        "servers_that_die", ranks=4, module="tests.weight_sync.server_programs", path=folder / "model",
        folder=folder / "run", ports=ports,
    )[0]  # fmt: skip


SERVED = {
    "both live": [0, 1],
    "nothing happened": [0, 1],
    "one was killed": [0],
    "it is back": [0, 1],
    "it dies in the update": [0],
    "all were dead for 2 s": [1],
}
"""By what happened, which servers have the new weights; in the order of the updates."""


@pytest.mark.parametrize("happened", SERVED)
def test_every_living_server_has_all_of_the_new_weights_and_goes_on(updates, ports, happened):
    """Bit for bit by name, against Megatron-Bridge's own export."""
    update, version = updates[happened], str(1 + list(SERVED).index(happened))
    assert update["urls"] == [f"http://127.0.0.1:{ports[number]}" for number in SERVED[happened]]
    for server in update["servers"]:
        assert server["digests"] == update["exported"]
        assert server["version"] == version and not server["paused"]


def test_the_servers_of_a_machine_take_the_model_from_messages_that_are_sent_once(updates):
    """Both get all of it, and the two ranks of the first node send half of the experts each."""
    for number, happened in enumerate(("both live", "nothing happened"), 1):
        update = updates[happened]
        assert update["buckets"] > 2
        assert [server["received"] for server in update["servers"]] == [number * update["bytes"]] * 2
        assert sum(update["sent"]) == update["bytes"] and update["sent"][2:] == [0, 0]
        assert update["sent"][0] > update["sent"][1] > 0


def test_it_is_said_who_is_left_out_and_who_is_taken_back(updates, ports):
    lost = f"server 1 of rollout.servers (http://127.0.0.1:{ports[1]}) does not answer; "
    back = "taken back, with the current weights: engine 1"
    left_out = "left out until they answer: engine {}"
    assert updates["nothing happened"]["said"] == []
    assert updates["one was killed"]["said"] == [lost + left_out.format("1")]
    assert updates["it is back"]["said"] == [back]
    assert updates["it dies in the update"]["said"] == [lost + left_out.format("1")]
    [said] = updates["all were dead for 2 s"]["said"]
    assert f"(http://127.0.0.1:{ports[0]}) does not answer; " + back in said
    assert said.endswith(left_out.format("0"))


def test_an_engine_that_waits_for_a_dead_neighbour_is_started_again_with_it_and_others_get_the_update(
    tmp_path,
):
    """It waits as over NCCL, which does not tell it. The node is megatron-pmd's own, engines are played."""
    write_model(tmp_path / "model", "qwen3moe")
    module = "tests.weight_sync.server_programs"
    updates = launch(
        "engine_that_waits", ranks=3, module=module, path=tmp_path / "model", folder=tmp_path / "run"
    )[0]
    before, meanwhile, after = updates.values()
    urls = before["urls"]
    assert meanwhile["urls"] == [urls[1]]
    [said] = meanwhile["said"]
    assert f"engine 0 on engine node 0 ({urls[0]}) does not answer" in said
    assert f"engine 2 ({urls[2]}) did not answer within 2 s" in said
    assert said.endswith("left out until they answer: engine 0, 2")
    assert meanwhile["seconds"] < 30, "no deadline but the update's own 5 s, and 2 s for each question"
    assert after["said"] == ["taken back, with the current weights: engine 0, 2"]
    assert after["urls"][1] == urls[1] and not {urls[0], urls[2]} & {*after["urls"]}
    for version, update in enumerate(updates.values(), 1):
        assert len(update["servers"]) == len(update["urls"])
        for server in update["servers"]:
            assert server["digests"] == update["exported"]
            assert server["version"] == str(version) and not server["paused"]
