"""One table over all trackers, from records old and new."""

from common import run
from common.metrics import trackers


def test_trackers_share_a_table_of_real_sequences():
    def record(command, **scores):
        metrics = [run.metric(name, value, "%") for name, value in scores.items()]
        return {"command": command, "recipe": command.split()[1], "data": "a: 3 sequences", "metrics": metrics}

    records = {
        "sbt": [
            record("train real_small", **{"otb/Man auc": 31.26, "otb/Man auc, still": 9.0, "otb auc": 50.0,
                                          "otb fps": 7.0, "otb fps_model": 9.0}),
            record("train tiny", **{"otb auc": 99.0}),
        ],
        "dualtfr": [record("train real_small --init x", **{"otb/Man auc": 40.0, "otb/Bolt auc": 20.0,
                                                           "otb/Bolt auc, static box": 11.0})],
    }
    assert trackers.real_table(records).splitlines() == [
        "| | sbt | dualtfr, pre-trained | static box |", "|---|---:|---:|---:|",
        "| otb/Man auc | 31.3 | 40.0 | 9.0 |", "| otb/Bolt auc | – | 20.0 | 11.0 |",
        "| mean of the 2 | – | 30.0 | 10.0 |",
        "| otb frames/s, with reading | 7.0 | – | – |", "| otb frames/s, the tracker alone | 9.0 | – | – |", "",
        "%, a single training each.",
    ]
    assert trackers.real_table({"sbt": []}) == "No runs are recorded yet.\n"


def test_other_data_have_a_table_of_their_own_and_seeds_their_spread():
    def record(recipe, data, **scores):
        metrics = [run.metric(name, value, "") | more for name, (value, more) in scores.items()]
        return {"command": f"train {recipe}", "recipe": recipe, "data": f"{data}: 3 sequences", "metrics": metrics}

    over = {"spread": 2.0, "seeds": [0, 1, 2]}
    records = {"maml_tracker": [
        record("real_small", "seven", **{"otb/Man auc": (31.0, {})}),
        record("real_lite0", "six", **{
            "got10k/a ao": (50.0, over), "got10k/a ao, CSRT (OpenCV)": (40.0, {}),
            "got10k ao": (48.0, over), "got10k ao, CSRT (OpenCV)": (39.0, {}),
            "got10k sizes lost": (1.0, over), "got10k fps": (38.0, over),
        }),
    ]}
    first, second = trackers.real_table(records).split("\n\n| ")
    assert "31.0" in first and "50.0" not in first
    assert second.splitlines() == [
        "| maml_tracker real_lite0 | CSRT (OpenCV) |", "|---|---:|---:|", "| got10k/a ao | 50.0 ± 2.0 | 40.0 |",
        "| mean of the 1 | 50.0 | 40.0 |", "| got10k ao, all together | 48.0 ± 2.0 | 39.0 |",
        "| sequences whose box has four times or a quarter of the area for ten frames | 1.0 ± 2.0 | – |",
        "| got10k frames/s, with reading | 38.0 ± 2.0 | – |", "",
        "%, mean ± sample standard deviation over seeds.",
    ]
