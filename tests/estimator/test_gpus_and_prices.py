"""The GPU table, prices, and files of a user's own."""

import dataclasses
import datetime

import pytest

from moejax import gpus, tpus
from moejax.errors import UserError
from moejax.estimator import bus, links, prices, targets


@pytest.mark.parametrize(
    ("name", "found"),
    [("a40", "A40"), ("A100-80GB", "A100-80"), ("a100_80", "A100-80"), ("A100", "A100-40"), ("NVIDIA H100", "H100"),
     ("H100 SXM", "H100"), ("h100 pcie", "H100-PCIe"), ("rtx 4090", "RTX-4090"), ("RTX4090", "RTX-4090"), ("V100-32GB", "V100-32"),
     ("RTX A6000", "A6000"), ("rtx 6000 ada generation", "RTX-6000-Ada"), ("RTX PRO 6000", "RTX-PRO-6000"), ("a2000 12gb", "RTX-A2000-12"),
     ("Tesla T4", "T4"), ("GH200 480GB", "GH200"), ("H100 NVL", "H100-NVL"), ("NVIDIA GeForce RTX 5090", "RTX-5090")],
)  # fmt: skip
def test_names(name, found):
    assert gpus.find(name).name == found


def test_an_unknown_gpu_names_the_nearest():
    with pytest.raises(UserError, match=r"unknown GPU 'A44': did you mean A40.*Known: A40, A100-40"):
        gpus.find("A44")
    with pytest.raises(UserError, match="unknown GPU 'zzzz': Known"):
        gpus.find("zzzz")


@pytest.mark.parametrize(
    ("kind", "tflops", "name"),
    [("NVIDIA H100 PCIe", 756, "H100-PCIe"), ("NVIDIA H100 80GB HBM3", 989, "H100"), ("NVIDIA A100-SXM4-40GB", 312, "A100-40"),
     ("NVIDIA A100-SXM4-80GB", 312, "A100-80"), ("NVIDIA A40", 149.7, "A40"), ("NVIDIA L40S", 362, "L40S"), ("NVIDIA L4", 121, "L4"),
     ("NVIDIA GeForce RTX 4090", 165, "RTX-4090"), ("NVIDIA A10G", 70, "A10G"), ("Tesla V100-SXM2-16GB", 125, "V100-16"),
     ("NVIDIA H200", 989, "H200"), ("NVIDIA B200", 2250, "B200"), ("NVIDIA H100 NVL", 835, "H100-NVL"),
     ("NVIDIA GH200 480GB", 990, "GH200"), ("NVIDIA A100 80GB PCIe", 312, "A100-80"),
     ("NVIDIA GeForce RTX 3090", 71, "RTX-3090"), ("NVIDIA GeForce RTX 5090", 209.5, "RTX-5090"),
     ("NVIDIA RTX A6000", 154.8, "A6000"), ("NVIDIA RTX 6000 Ada Generation", 364.2, "RTX-6000-Ada"), ("Tesla T4", 65, "T4"),
     ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 503.8, "RTX-PRO-6000"), ("NVIDIA RTX A2000 12GB", 31.9, "RTX-A2000-12")],
)  # fmt: skip
def test_jax_device_kinds(kind, tflops, name):
    """What jax calls a GPU finds it, and the peak that the training loop divides by."""
    gpu = gpus.of_device_kind(kind)
    assert gpu.name == name and gpu.flops_per_second == tflops * 1e12


@pytest.mark.parametrize(
    "kind",
    ["NVIDIA A4000", "NVIDIA A40-48Q", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D", "NVIDIA GeForce RTX 3090 Ti",
     "NVIDIA GeForce RTX 5090 D", "NVIDIA GeForce RTX 5090 Laptop GPU", "NVIDIA RTX A2000", "NVIDIA RTX A2000 8GB Laptop GPU",
     "Quadro RTX 6000", "NVIDIA RTX 5000 Ada Generation", "NVIDIA T4G", "NVIDIA GH200 144G HBM3e", "NVIDIA H200 NVL", "NVIDIA L40",
     "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition",
     "NVIDIA RTX PRO 6000 Blackwell Server Edition", "NVIDIA GB200", "Tesla V100S-PCIE-32GB"],
)  # fmt: skip
def test_a_device_of_a_like_name_is_no_card_of_the_table(kind):
    assert gpus.of_device_kind(kind) is None


def test_every_gpu_is_plausible():
    for gpu in gpus.GPUS.values():
        assert 6 < gpu.memory_gb < 200 and 250e9 < gpu.bytes_per_second < 1e13 and 3e13 < gpu.flops_per_second < 3e15
        if gpu.device_bytes:
            assert gpu.device_bytes == pytest.approx(gpu.memory_gb * 1e9, rel=0.08)
    names = [gpus._plain(n) for g in gpus.GPUS.values() for n in (g.name, *g.aliases)]
    assert len(names) == len(set(names))


def test_fp32_products_are_in_tf32_where_a_card_has_it():
    """Data sheets agree with cores x clock (64 cores a multiprocessor up to sm_80, then 128), and tf32 is half of bf16."""
    for gpu in gpus.GPUS.values():
        c = gpu.compiler
        cores = 64 if float(c.compute_capability) <= 8.0 else 128
        assert gpu.rate("float32", exact=True) == pytest.approx(2e9 * cores * c.multiprocessors * c.clock_ghz, rel=0.02), gpu.name
        assert gpu.rate("bfloat16") == gpu.flops_per_second
        if gpu.bf16:
            assert gpu.rate("float32") == pytest.approx(gpu.flops_per_second / 2, rel=0.02), gpu.name
    assert [gpus.GPUS[name].rate("float32") / 1e12 for name in ("T4", "V100-16", "A100-40")] == [8.1, 15.7, 156]
    assert tpus.CHIPS["v5e"].rate("float32") == tpus.CHIPS["v5e"].flops_per_second  # rounds operands to bf16


CARD = "X: {memory_gb: 48, bandwidth_gb_per_second: 696, bf16_tflops: 150"


def test_a_users_own_gpu_is_compiled_for_by_its_figures(tmp_path):
    path = tmp_path / "gpus.yaml"
    path.write_text(CARD.replace("X", "mine") + ", compute_capability: 8.6, multiprocessors: 84, l2_mb: 6, clock_ghz: 1.74}")
    gpu = gpus.from_yaml(path)["mine"]
    text, a40 = targets.target_text(gpu), gpus.GPUS["A40"]
    assert text == targets.target_text(a40).replace("NVIDIA A40", "NVIDIA mine").replace(str(a40.device_bytes), "48000000000")
    assert gpu.platform == "sm8"
    path.write_text(CARD + ", compute_capability: 6.1, multiprocessors: 28, l2_mb: 3, clock_ghz: 1.6}")
    old = gpus.from_yaml(path)["X"]
    assert targets.target_text(old) is None and targets.target_text(dataclasses.replace(old, compiler=None)) is None


def test_a_users_own_gpu(tmp_path):
    path = tmp_path / "gpus.yaml"
    path.write_text("RTX-5090: {memory_gb: 32, bandwidth_gb_per_second: 1790, bf16_tflops: 210, watts: 575}\n")
    gpu = gpus.find("rtx5090", gpus.from_yaml(path))
    assert (gpu.memory_gb, gpu.bytes_per_second, gpu.flops_per_second, gpu.source) == (32, 1790e9, 210e12, "gpus.yaml")
    assert gpus.find("H100", gpus.from_yaml(path)) == gpus.GPUS["H100"]
    assert gpu.rate("float32") == 105e12
    path.write_text(CARD.replace("150", "150, fp32_tflops: 30, tf32_tflops: 70") + "}")
    assert [gpus.from_yaml(path)["X"].rate("float32", exact=exact) for exact in (False, True)] == [70e12, 30e12]
    path.write_text("rtx 5090: {memory_gb: 24, bandwidth_gb_per_second: 1790, bf16_tflops: 210, bf16: false}\n")
    table = gpus.from_yaml(path)  # in place of the table's, not next to it
    assert len(table) == len(gpus.GPUS) and gpus.find("RTX-5090", table).memory_gb == 24 and not table["rtx 5090"].bf16
    assert table["rtx 5090"].rate("float32") == 210e12 / 8  # as of a T4 or V100


@pytest.mark.parametrize(
    ("text", "message"),
    [("X: {memory_gb: 32}", "lacks bandwidth_gb_per_second, bf16_tflops"),
     ("X: {memory_gb: -1, bandwidth_gb_per_second: 1, bf16_tflops: 1}", "memory_gb = -1: expected a number above 0"),
     ("X: {memory_gb: yes, bandwidth_gb_per_second: 1, bf16_tflops: 1}", "memory_gb = True"),
     ("X: {memory_gb: .inf, bandwidth_gb_per_second: 1, bf16_tflops: 1}", "memory_gb = inf"),
     ("X: {memory_gb: 1, bandwidth_gb_per_second: 1, bf16_tflops: 1, bf16: none}", "bf16 = 'none': expected true or false"),
     ("X: {memory_gb: 1, bandwidth_gb_per_second: 1, bf16_tflops: 1, flops: 2}", "unknown flops"),
     (f"{CARD}, tf32_tflops: 0}}", "X.tf32_tflops = 0: expected a number above 0"),
     (f"{CARD}, pcie: 2}}", "X.pcie = 2: expected one of 3, 4, 5"), (f"{CARD}, pcie_lanes: 12}}", "X.pcie_lanes = 12: expected one"),
     (f"{CARD}, compute_capability: 8.6, l2_mb: 6}}", "X has compute_capability, l2_mb, but no multiprocessors, clock_ghz: to compile"),
     (f"{CARD}, compute_capability: sm_86, l2_mb: 6, multiprocessors: 84, clock_ghz: 1}}", "X.compute_capability = .sm_86.: expected"),
     (f"{CARD}, compute_capability: 8.6, l2_mb: 6, multiprocessors: 8.5, clock_ghz: 1.7}}", "X.multiprocessors = 8.5: expected a whole"),
     (f"{CARD}, compute_capability: 8.6, l2_mb: 6, multiprocessors: 84, clock_ghz: 0}}", "X.clock_ghz = 0: expected a number above 0"),
     ("- a", "expected lines like"), ("a: [", "gpu-file")],
)  # fmt: skip
def test_bad_gpu_files(tmp_path, text, message):
    path = tmp_path / "gpus.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        gpus.from_yaml(path)
    with pytest.raises(UserError, match="No such file"):
        gpus.from_yaml(tmp_path / "none.yaml")


def test_sets_are_dated_and_of_known_gpus():
    for offers in prices.SETS.values():
        for price in offers:
            assert (price.gpu in gpus.GPUS or price.gpu in tpus.CHIPS) and price.day[:3] == "202" and price.seller
            assert price.usd_per_hour > 0 or "free" in price.told
            assert price.day in price.told and price.seller in price.told
    assert [p.usd_per_hour for p in prices.STUDY] == [0.79, 1.67, 2.10]


CATALOG = """InstanceType,AcceleratorName,AcceleratorCount,vCPUs,MemoryGiB,Price,Region,GpuInfo,SpotPrice
p4d.24xlarge,A100,8.0,96,1152,21.96,us-east-1,x,8.8
one_h100,H100,1,16,200,3.99,US,x,
one_h100,H100,1,16,200,4.99,CA,x,1.5
two_h100,H100,2,32,400,5.00,US,x,
m5.large,,,2,8,0.096,us-east-1,,0.03
trn1.2xlarge,Trainium,1,8,32,1.34,us-east-1,x,0.4
"""


def test_skypilots_catalog(tmp_path):
    """Price per instance; one GPU's share of it; instances of one GPU first; spot only where asked."""
    path = tmp_path / "cloud.csv"
    path.write_text(CATALOG)
    offers = prices.load(str(path))
    assert len(offers) == 6
    best = prices.cheapest(offers, "H100")
    assert (best.usd_per_hour, best.gpus_rented, best.spot) == (3.99, 1, False) and best.seller == "cloud one_h100 US"
    assert prices.cheapest(offers, "H100", spot=True).usd_per_hour == 1.5
    a100 = prices.cheapest(offers, "A100-40")
    assert a100.usd_per_hour == pytest.approx(2.745) and "1 of 8 GPUs" in a100.told
    assert prices.cheapest(offers, "A40") is None


def test_simple_csv(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("gpu,usd_per_hour,seller,day,spot\nh100,2.5,Me,2026-11-01,\nA40,0.3,,,yes\n")
    h100, a40 = prices.load(str(path))
    assert h100 == prices.Price("H100", 2.5, "Me", "2026-11-01")
    assert a40.seller == "mine" and a40.spot and a40.day.startswith("file of 20")


@pytest.mark.parametrize(
    ("text", "message"),
    [("InstanceType,AcceleratorName,Price\na,H100,3\n", "columns AcceleratorCount, Region, SpotPrice missing"),
     ("gpu,price\nH100,3\n", "column usd_per_hour missing"),
     ("gpu,eur_per_hour\nH100,3\n", "column eur_per_hour is not in US dollars"),
     ("gpu,usd_per_hour,currency\nH100,3,EUR\n", "currency EUR"),
     ("gpu,usd_per_hour\nH100,free\n", "line 2: usd_per_hour = 'free'"),
     ("gpu,usd_per_hour\nH100,-2\n", "line 2: usd_per_hour = '-2'"),
     ("gpu,usd_per_hour\nH100,€3\n", "line 2: usd_per_hour = '€3'"),
     ("gpu,usd_per_hour\nH1000,3\n", "unknown GPU 'H1000': did you mean H100"),
     ("gpu,usd_per_hour\n", "no row has a price"),
     ("", "missing")],
)  # fmt: skip
def test_bad_price_files(tmp_path, text, message):
    path = tmp_path / "prices.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        prices.load(str(path))


def test_a_price_file_that_is_none():
    with pytest.raises(UserError, match=r"nowhere.csv does not exist: .*one of study, 2026"):
        prices.load("nowhere.csv")


def test_cheapest_prefers_one_gpu_of_its_own():
    whole = dataclasses.replace(prices.STUDY[2], usd_per_hour=1.0, gpus_rented=8)
    assert prices.cheapest([whole, prices.STUDY[2]], "H100") == prices.STUDY[2]


def test_links_are_those_of_their_sheets():
    """Which joins this many of a card; beyond one machine its ports; a card without a known network says what to give."""
    asked = [("H100", 8), ("H100-NVL", 2), ("H100-NVL", 4), ("A40", 2), ("A40", 4), ("L4", 2), ("B200", 8), ("RTX-4060", 2), ("A100-80", 4)]
    assert [links.between(gpus.find(name), n).name for name, n in asked] == [
        "NVLink 4", "NVLink 4 bridge", "PCIe 5 x16", "NVLink 3 bridge", "PCIe 4 x16", "PCIe 4 x16", "NVLink 5", "PCIe 4 x8", "NVLink 3"
    ]  # fmt: skip
    assert links.between(gpus.find("H100"), 8).rate == 0.8 * 450e9
    assert [bus.PCIE[generation] for generation in (3, 4, 5)] == pytest.approx([12.6e9, 25.2e9, 50.4e9])
    over = links.between(gpus.find("H100"), 64)
    assert over.name == "InfiniBand NDR, 8 ports a machine" and over.rate == pytest.approx(0.8 * 8 * 50e9)
    with pytest.raises(UserError, match=r"16 x L4: no network .* --link GB/s"):
        links.between(gpus.find("L4"), 16)
    assert links.given(20).rate == pytest.approx(20e9)
    with pytest.raises(UserError, match="--link 0"):
        links.given(0)
    assert all(link.source and all(card in gpus.GPUS or card in tpus.CHIPS for card in link.cards) for link in links.LINKS.values())


def test_old_prices_are_called_old():
    day = datetime.date(2026, 11, 30)
    assert prices.old(prices.DATED, "2026", day) == [] and prices.old(prices.STUDY, "study", day) == []  # the study names no day
    (line,) = prices.old(prices.DATED, "2026", datetime.date(2027, 1, 31))
    assert line.startswith("warning: the newest price in 2026 is of 2026-11-09, 83 days ago")
    price = prices.Price("A40", 1.0, "me", "2026-08-31")
    assert prices.aged(price, day) == " (91 days old)" and prices.aged(dataclasses.replace(price, day="2026-11-01"), day) == ""
    assert prices.aged(dataclasses.replace(price, day="2026-06"), day) == " (182 days old)"  # of a month, the first
