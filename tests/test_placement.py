"""Which nodes hold a study's trials and how many at once, also as nodes come and go; no Ray is started."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from raytune_autotuner.engine.catalog import make_engine
from raytune_autotuner.study.errors import ConfigError
from raytune_autotuner.study.file import parse_study
from raytune_autotuner.study.study import Study
from raytune_autotuner.tune.cluster import Cluster, Node, address_of
from raytune_autotuner.tune.trainable import EngineTrial
from tests.studies import BASE, merged

FAST = Node(16, 8, "fast", ("H100",), {"zone": "a"})
SLOW = Node(16, 8, "slow", ("A100",), {"zone": "b"})
HEAD = Node(0, 0, "head")


def study(**resources: Any) -> Study:
    return parse_study(merged(BASE, {"resources": {"gpus": 2, "cpus": 1, **resources}}))


def cluster(*nodes: Node) -> Cluster:
    return Cluster(nodes, None, here="head")


def slots(cluster: Cluster, study: Study) -> int:
    return cluster.slots(study, make_engine(study))


@pytest.mark.parametrize(
    ("resources", "expected"),
    [
        ({}, 8),
        ({"max_concurrent": 3}, 3),
        ({"accelerator_type": "H100"}, 4),
        ({"node_labels": {"zone": "b"}}, 4),
        ({"accelerator_type": "H100", "node_labels": {"zone": "b"}}, 0),
    ],
)
def test_only_nodes_of_the_wanted_kind_hold_trials(resources: dict[str, Any], expected: int) -> None:
    assert slots(cluster(HEAD, FAST, SLOW), study(**resources)) == expected


def test_slots_follow_the_nodes_down_to_none() -> None:
    asked = study()
    assert [slots(cluster(*nodes), asked) for nodes in ([FAST, SLOW], [FAST], [HEAD], [])] == [8, 4, 0, 0]


def test_no_trial_does_without_gpus_because_their_nodes_are_gone() -> None:
    gone = replace(cluster(HEAD), had_gpus=True)
    assert (cluster(HEAD, FAST).has_gpus, gone.has_gpus, cluster(HEAD).has_gpus) == (True, True, False)


@pytest.mark.parametrize(
    ("resources", "named"),
    [({"cpus": 17}, "the cluster has 3 nodes"), ({"accelerator_type": "B200"}, "accelerators: A100, H100")],
)
def test_what_no_node_holds_is_refused_with_what_there_is(resources: dict[str, Any], named: str) -> None:
    asked = study(**resources)
    with pytest.raises(ConfigError, match=named):
        cluster(HEAD, FAST, SLOW).require(asked, make_engine(asked))
    with pytest.raises(ConfigError, match=named):
        cluster(HEAD, FAST, SLOW).for_trials(asked)


def test_the_engine_is_asked_on_a_node_that_runs_trials_unless_the_drivers_own_is_one() -> None:
    assert not cluster(HEAD, FAST).runs_trials_here(study())
    assert replace(cluster(HEAD, FAST), here="fast").runs_trials_here(study())
    big_head = Node(64, 0, "head")
    assert not cluster(big_head, FAST).runs_trials_here(study())
    assert cluster(big_head, FAST).runs_trials_here(study(gpus=0))


def test_cores_are_bound_where_a_node_holds_several_trials_without_gpus() -> None:
    def cores(node: Node, **resources: Any) -> int:
        asked = study(gpus=0, **resources)
        return int(cluster(node).trial_config(asked, make_engine(asked), {})["cores"])

    assert cores(Node(4, 0), cpus=2) == 2
    assert cores(Node(2, 0), cpus=2) == 0
    assert cores(Node(4, 0), cpus=2, max_concurrent=1) == 0


def test_a_trial_asks_for_one_node_of_its_kind() -> None:
    asked = study(accelerator_type="H100", node_labels={"zone": "a"})
    config = cluster(FAST).trial_config(asked, make_engine(asked), {})
    request = EngineTrial.default_resource_request(config)
    assert request.bundles == [{"CPU": 1.0, "GPU": 2.0, "accelerator_type:H100": 0.001}]
    assert request.strategy == "STRICT_PACK"
    assert hash(request) == hash(EngineTrial.default_resource_request(config))


SPANNING = {"engine": {"args": {"tensor-parallel-size": 4, "pipeline-parallel-size": 2}}}


def spanning(**resources: Any) -> Study:
    return parse_study(merged(merged(BASE, SPANNING), {"resources": {"gpus": 8, "cpus": 1, "nodes": 2, **resources}}))


def test_a_trial_over_several_nodes_asks_for_its_share_of_the_gpus_on_each() -> None:
    asked = spanning()
    config = cluster(FAST, SLOW).trial_config(asked, make_engine(asked), {})
    request = EngineTrial.default_resource_request(config)
    assert request.bundles == [{"CPU": 1.0, "GPU": 4.0}] * 2
    assert request.strategy == "STRICT_SPREAD"


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [((FAST, SLOW), 2), ((FAST, SLOW, FAST), 3), ((FAST,), 0), ((FAST, Node(16, 4, "small")), 1), ((FAST, HEAD), 0)],
)
def test_slots_of_trials_over_two_nodes_are_pairs_of_places_on_different_ones(
    nodes: tuple[Node, ...], expected: int
) -> None:
    assert slots(cluster(*nodes), spanning()) == expected


@pytest.mark.parametrize(
    ("resources", "named"),
    [
        ({}, "1 CPUs and 4 GPUs on each of 2 nodes, but the cluster has 1 node"),
        ({"nodes": 4}, "1 CPUs and 2 GPUs on each of 4 nodes"),
        ({"nodes": 16, "gpus": 16}, "tensor x pipeline parallel size, 8, cannot be divided evenly among 16 nodes"),
    ],
)
def test_a_cluster_without_so_many_nodes_is_refused_before_anything_starts(
    resources: dict[str, Any], named: str
) -> None:
    asked = spanning(**resources)
    with pytest.raises(ConfigError, match=named):
        cluster(FAST).require(asked, make_engine(asked))


@pytest.mark.parametrize(
    ("resources", "key"),
    [
        ({"node_labels": {"zone": "in(a, b)"}}, "resources.node_labels"),
        ({"node_labels": {"": "a"}}, "resources.node_labels"),
        ({"accelerator_type": "NVIDIA H100"}, "resources.accelerator_type"),
    ],
)
def test_what_is_no_label_or_name_of_an_accelerator_is_refused(resources: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        study(**resources)


def test_an_address_is_not_one_from_outside() -> None:
    with pytest.raises(ConfigError, match="submit the study as a job"):
        parse_study({**BASE, "ray": {"address": "ray://head:10001"}})


def test_a_rays_job_joins_its_own_cluster_and_keeps_its_results(monkeypatch: pytest.MonkeyPatch) -> None:
    assert address_of(study(), Path("results")) is None
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert address_of(study(), Path("/shared/results")) == "auto"
    with pytest.raises(ConfigError, match="Ray deletes"):
        address_of(study(), Path("/tmp/ray/session_x/runtime_resources/working_dir_files/_ray_pkg_x/results"))
