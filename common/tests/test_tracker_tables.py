"""One table over all trackers, from records old and new."""

from common import run
from common.metrics import trackers


def test_trackers_share_a_table_of_real_sequences():
    def record(command, **scores):
        return {"command": command, "metrics": [run.metric(name, value, "%") for name, value in scores.items()]}

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
