"""`estimate.py reproduce`."""

import json

from moejax import cli


def run(capsys, *arguments):
    code = cli.estimate_main(["reproduce", *arguments])
    return code, *capsys.readouterr()


def test_reproduce(capsys, tmp_path):
    code, out, err = run(capsys, "--plot", str(tmp_path / "figures"))
    assert code == 0 and out.rstrip().endswith("bars met")
    for text in ("Table III", "Figure 13", "Figures 14 and 15", "Table IV", "8.977", "27.915", "0.498", "6.15%", "1.263"):
        assert text in out
    drawn = sorted(p.name for p in (tmp_path / "figures").iterdir())
    assert drawn == ["figure_13.png", "figures_14_15.png"] and err.count("drawn: ") == 2
    assert all((tmp_path / "figures" / name).stat().st_size > 20_000 for name in drawn)


def test_reproduce_json(capsys):
    code, out, _ = run(capsys, "--json")
    found = json.loads(out)
    assert code == 0 and found["bars"]["met"] is True
    row = found["figures_14_15"]["rows"][2]
    assert row["curve"] == "a40/blackmamba/commonsense_15k" and row["printed RMSE"] == 0.79 and round(row["recomputed"], 3) == 0.788

