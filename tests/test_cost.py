"""Bytes and operations against counts made by hand, and the prediction's limits."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks import roofline
from benchmarks.floors import DEPTHS, blocks_of, floors_of, network_floors, stem_floors, whole_of
from benchmarks.roofline import NOMINAL
from fused_resblock.kernels.cost import (
    LAUNCH,
    Ceilings,
    Cost,
    Gemm,
    conv_bn_act_cost,
    conv_halo_cost,
    elementwise_cost,
    expand_shift_cost,
    expand_shift_halo_cost,
    predicted,
    register_count,
    resident_programs,
    shared_bytes,
    stem_cost,
)
from fused_resblock.kernels.tiles import StageTile, StemTile, Tile

TILE = Tile(128, 64, 64, 4, 3)
CHIP = Ceilings("unit", dram=1000.0, l2=2000.0, matrix=4000.0, multiprocessors=4)


def test_pointwise_convolution_by_hand():
    """2 images of 8x8, 64 -> 128 channels, 2-byte elements."""
    gemm = Gemm(m=128, n=128, k=64, taps=1, in_pixels=128)
    cost = conv_bn_act_cost(gemm, 2, TILE)
    assert cost.flops == 2 * 128 * 128 * 64
    assert cost.dram == 2 * (128 * 64 + 128 * 64 + 128 * 128)  # input, filters, output
    # two programs, one step each of a 128x64 and a 64x64 piece, and the output
    assert cost.l2 == 2 * (2 * (128 * 64 + 64 * 64) + 128 * 128)


def test_residual_is_read_once():
    gemm = Gemm(m=128, n=128, k=64, taps=1, in_pixels=128)
    extra = conv_bn_act_cost(gemm, 2, TILE, residual=True).dram - conv_bn_act_cost(gemm, 2, TILE).dram
    assert extra == 2 * 128 * 128


def test_three_by_three_reads_the_input_once_from_memory_and_nine_times_from_l2():
    gemm = Gemm(m=256, n=64, k=64, taps=9, in_pixels=256)
    cost = conv_bn_act_cost(gemm, 2, TILE)
    assert cost.dram == 2 * (256 * 64 + 64 * 64 * 9 + 256 * 64)
    assert cost.l2 == 2 * (2 * 9 * (128 + 64) * 64 + 256 * 64)
    assert cost.flops == 2 * 256 * 64 * 64 * 9


def test_groups_divide_filters_and_operations():
    gemm = Gemm(m=64, n=128, k=128, taps=9, in_pixels=64, groups=32)
    assert gemm.flops == 2 * 64 * 128 * 4 * 9
    assert gemm.dram(2) == 2 * (64 * 128 + 128 * 4 * 9)


def test_second_gemm_adds_its_input_and_filters_but_no_output():
    main = Gemm(m=128, n=128, k=64, taps=1, in_pixels=128)
    branch = Gemm(m=128, n=128, k=32, taps=1, in_pixels=128)
    both = conv_bn_act_cost(main, 2, TILE, second=branch)
    assert both.dram - conv_bn_act_cost(main, 2, TILE).dram == 2 * (128 * 32 + 128 * 32)


def test_tile_of_128_by_64_does_43_operations_a_byte_of_l2():
    gemm = Gemm(m=1 << 20, n=64, k=64, taps=9, in_pixels=1 << 20)
    assert gemm.flops / gemm.l2(2, TILE) == pytest.approx(42.67, abs=0.01)


def test_elementwise():
    assert elementwise_cost(100, 2, reads=2) == Cost(600, 600, 0)


def test_floor_and_bound():
    assert Cost(1000, 100, 100).floor(CHIP) == 1.0
    assert Cost(1000, 100, 100).bound(CHIP) == "dram"
    assert Cost(100, 100, 8000).floor(CHIP) == 2.0
    assert Cost(100, 9000, 8000).bound(CHIP) == "l2"


def test_prediction_counts_the_last_wave():
    cost = Cost(10, 10, 4000)
    full, one_more = (predicted(cost, n, resident=1, chip=CHIP) for n in (4, 5))
    assert full == pytest.approx(LAUNCH + 1.0)
    assert one_more == pytest.approx(LAUNCH + 8 / 5)


def test_prediction_of_few_programs_is_not_below_the_floor():
    cost = Cost(4000, 10, 10)
    assert predicted(cost, 1, resident=1, chip=CHIP) == pytest.approx(LAUNCH + 8.0)  # one multiprocessor of four


def test_no_wave_ends_before_its_steps():
    cost = Cost(10, 10, 10)
    assert predicted(cost, 9, resident=2, chip=CHIP, step_seconds=3.0) == pytest.approx(LAUNCH + 6.0)


def test_times_that_hinder_each_other_add_up_by_the_fourth_power():
    near, far = Cost(1000, 2000, 4000), Cost(1000, 200, 400)  # three times of one second; one, and two of a tenth
    options = {"programs": 4, "resident": 1, "chip": CHIP}
    assert predicted(near, **options) == predicted(far, **options) == pytest.approx(LAUNCH + 1.0)
    assert predicted(near, **options, hindered=True) == pytest.approx(LAUNCH + 3 ** (1 / 4))
    assert predicted(far, **options, hindered=True) == pytest.approx(LAUNCH + 1.0, abs=1e-4)
    assert predicted(far, **options, hindered=True, step_seconds=1.0) == pytest.approx(LAUNCH + 2 ** (1 / 4), abs=1e-4)


def test_stage_kernel_by_hand():
    """An identity block of width 64 with the next reduce: 20 C elements a pixel where conv by conv moves 32 C."""
    m = 1 << 20
    conv, expand, reduce = Gemm(m, 64, 64, 9, m), Gemm(m, 256, 64, 1, m), Gemm(m, 64, 256, 1, m)
    tile = StageTile(128, 64, 64, 8, 3, 2)
    cost = expand_shift_cost(conv, expand, 2, tile, reduce=reduce)
    filters = 2 * (64 * 64 * 9 + 64 * 256 + 256 * 64)
    moved = 2 * m * (64 + 256 + 256 + 64)  # h, residual, y, g
    assert cost.dram == moved + filters
    assert cost.flops == 2 * m * (64 * 64 * 9 + 2 * 64 * 256)
    assert cost.l2 == m // 128 * (2 * 128 * 64 * 9 + filters) + 2 * m * (256 + 256 + 64)
    second = Gemm(m, 256, 64, 1, m)
    first = expand_shift_cost(conv, expand, 2, tile, second=second, reduce=reduce)
    assert first.dram == cost.dram - 2 * m * 256 + 2 * (m * 64 + 64 * 256)
    assert first.flops == cost.flops + 2 * m * 64 * 256
    held = expand_shift_cost(conv, expand, 2, replace(tile, held=True), second=second, reduce=reduce)
    assert (held.dram, held.flops) == (first.dram, first.flops)
    assert first.l2 - held.l2 == 3 * 2 * m * 64  # for one chunk of four


def test_taps_from_shared_memory_by_hand():
    """Three boxes with two rows more than eight instead of nine taps; filters once a program."""
    m = 1 << 20
    conv, expand, reduce = Gemm(m, 64, 64, 9, m), Gemm(m, 256, 64, 1, m), Gemm(m, 64, 256, 1, m)
    pixels, filters = 2 * m * 64, 2 * 64 * 64 * 9
    alone, added = conv_halo_cost(conv, 2, 264), conv_halo_cost(conv, 2, 264, residual=True)
    assert (alone.dram, alone.flops) == (2 * pixels + filters, 2 * m * 64 * 64 * 9)
    assert alone.l2 == pixels * 30 // 8 + 264 * filters + pixels
    assert added == alone + Cost(pixels, pixels, 0)
    grouped = conv_halo_cost(Gemm(m, 128, 128, 9, m, 2), 2, 264)
    assert grouped.l2 == 2 * (pixels * 30 // 8 + pixels) + 264 * filters
    filters += 2 * (64 * 256 + 256 * 64)
    tail, before = (
        expand_shift_halo_cost(conv, expand, 2, 132, reduce=reduce),
        expand_shift_cost(conv, expand, 2, StageTile(64, 64, 64, 4, 3, 2), reduce=reduce),
    )
    assert (tail.dram, tail.flops) == (before.dram, before.flops)
    assert tail.l2 == pixels * 30 // 8 + 132 * filters + 2 * m * (256 + 256 + 64)


def test_shared_memory_and_registers():
    tile = Tile(128, 64, 64, 4, 3)
    assert shared_bytes(tile, 2) == 3 * (128 + 64) * 64 * 2
    assert shared_bytes(replace(tile, persistent=1), 2, residual=True) == 3 * 192 * 128 + 2 * 128 * 64 * 2
    assert shared_bytes(replace(tile, persistent=1), 2, second=True) == 6 * 192 * 128 + 128 * 64 * 2
    assert register_count(tile) == 64 + 36
    assert resident_programs(tile, 2, 228 << 10) == 3  # shared memory: 3 of 72 KiB and 1 KiB each
    assert resident_programs(Tile(256, 128, 64, 4, 3), 2, 228 << 10) == 0  # 256 accumulators a thread
    assert resident_programs(Tile(128, 128, 64, 8, 4), 2, 100 << 10) == 0  # 128 KiB


def test_identity_bottleneck_of_layer_1_by_hand():
    """Batch 128, fp16: 401,408 pixels; tensors of 64 channels are 51.4 MB, of 256 channels 205.5 MB."""
    floors = floors_of(blocks_of("bottleneck")["l1"], 128, 2, NOMINAL)
    small, large = 401408 * 64 * 2, 401408 * 256 * 2
    assert floors.whole == pytest.approx(2 * large / 3.0e12, rel=0.01)
    memory = (large + small) + (small + large + large)  # reduce; expand with its residual
    conv3x3 = 2 * 401408 * 64 * 64 * 9 / 700e12  # the one that the matrix units bind
    assert floors.per_conv == pytest.approx(memory / 3.0e12 + conv3x3, rel=0.01)


def test_stem_by_hand():
    """An image of 32x32, 7x7 with 64 filters: 16x16 pixels, 8x8 pooled; one program of 8 rows and 15 columns."""
    conv = Gemm(m=256, n=64, k=3, taps=49, in_pixels=1024)
    cost = stem_cost(conv, 64, 2, StemTile(8, 16))
    image, copy, filters, output = 1024 * 3 * 2, 1024 * 4 * 2, 64 * 3 * 49 * 2, 64 * 64 * 2
    assert cost.dram == image + filters + 2 * copy + output
    computed = round(256 * 17 / 16 * 16 / 15)  # a row above and a pair of columns to the left are computed twice
    assert cost.flops == 2 * computed * 64 * 7 * 8 * 4  # windows of 8 columns and 4 channels
    assert cost.l2 == cost.dram - copy + round(copy * 17 / 16 * 16 / 15) + 64 * 7 * 32 * 2


def test_stem_of_a_resnet_by_hand():
    """Batch 128, fp16: images of 38.5 MB, 64 channels of 112x112 are 205.5 MB, pooled 51.4 MB."""
    floors = stem_floors(128, 2, NOMINAL)
    image, large, pooled = 128 * 224**2 * 3 * 2, 128 * 112**2 * 64 * 2, 128 * 56**2 * 64 * 2
    flops = 2 * 128 * 112**2 * 64 * 147
    assert floors.whole == pytest.approx(max((image + pooled) / 3.0e12, flops / 700e12), rel=0.01)
    conv = max((image + large) / 3.0e12, flops / 700e12)
    assert floors.per_conv == pytest.approx(conv + (large + pooled) / 3.0e12, rel=0.01)
    assert floors.whole < floors.ours < floors.eager


@pytest.mark.parametrize("name", DEPTHS)
def test_every_network_has_floors_below_its_prediction(name):
    total, rows = network_floors(name, 32, 2, NOMINAL)
    assert sum(count for _, count, _ in rows) == sum(DEPTHS[name][1])
    assert total.whole <= total.stage <= total.per_conv < total.eager
    assert total.stage < total.ours_stage <= total.ours * 1.001


def test_networks_are_the_sum_of_their_blocks():
    total, rows = network_floors("resnet50", 128, 2, NOMINAL)
    assert sum(count for _, count, _ in rows) == 16
    assert total.whole == pytest.approx(sum(count * floors.whole for _, count, floors in rows))
    assert total.whole < total.per_conv < total.eager


def test_the_last_block_of_layer_1_feeds_layer_2_by_hand():
    """Besides its own bytes it writes layer 2's 128 channels, and layer 2's first block has no head of its own."""
    _, rows = network_floors("resnet50", 128, 2, NOMINAL)
    floors = {block: floors for block, _, floors in rows}
    large, small, next_small = (401408 * channels * 2 for channels in (256, 64, 128))
    assert floors["l1.last"].stage == pytest.approx((small + large + large + next_small) / 3.0e12, rel=0.01)
    first = blocks_of("bottleneck")["l2.first"]
    head = floors_of(first, 128, 2, NOMINAL).stage - floors_of(first, 128, 2, NOMINAL, headless=True).stage
    assert head == pytest.approx((large + next_small) / 3.0e12, rel=0.01)
    assert floors["l4.first"].stage == floors["l4.first"].per_conv, "layer 4 is too wide: its head is its own"


def test_whole_blocks_are_followed_by_blocks_with_a_head_of_their_own():
    total, rows = network_floors("resnet50", 128, 2, NOMINAL)
    floors, blocks = {block: floors for block, _, floors in rows}, blocks_of("bottleneck")
    for block, last in (("l1", "l1.last"), ("l1.first", "l1.first"), ("l2", "l2.last")):
        seconds = whole_of(blocks[block], 128, 2, NOMINAL)
        assert floors[block].ours_whole == floors[last].ours_whole == seconds > floors[block].whole
    before = floors_of(blocks["l2.first"], 128, 2, NOMINAL)
    assert floors["l2.first"].ours_whole == before.ours_stage, "neither its head nor the next one's is in a tail"
    behind = floors_of(blocks["l3.first"], 128, 2, NOMINAL, blocks["l3"][0])
    assert floors["l3.first"].ours_whole == behind.ours_stage
    assert floors["l4"].ours_whole == floors["l4"].ours_stage
    assert total.ours_whole == pytest.approx(sum(count * f.ours_whole for _, count, f in rows))


@pytest.mark.parametrize(
    ("kind", "block", "itemsize", "there"),
    [
        ("bottleneck", "l1.first", 2, True),
        ("bottleneck", "l1.first", 4, False),
        ("bottleneck", "l2.first", 2, False),
        ("bottleneck", "l3", 2, False),
        ("wide", "l1.first", 2, True),
        ("wide", "l1", 2, True),
        ("wide", "l2", 2, False),
        ("grouped", "l1", 2, False),
        ("basic", "l1", 2, False),
    ],
)
def test_where_a_block_may_be_one_kernel(kind, block, itemsize, there):
    assert (whole_of(blocks_of(kind)[block], 128, itemsize, NOMINAL) is not None) == there


def test_stages_are_alone():
    """So that what the last tail of the stage before does in a body is done by the stage itself."""
    total, blocks = network_floors("resnet50", 128, 2, NOMINAL)
    stages = {name: floors for name, _, floors in roofline.stages("resnet50", 128, 2, NOMINAL)}
    assert list(stages) == ["layer1", "layer2", "layer3", "layer4"]
    of_body = {name: floors.stage * count for name, count, floors in blocks}
    bodies = {stage: sum(time for name, time in of_body.items() if name[1] == stage[-1]) for stage in stages}
    assert stages["layer1"].stage < bodies["layer1"]
    assert stages["layer2"].stage > 1.1 * bodies["layer2"]
    assert sum(floors.ours for floors in stages.values()) == pytest.approx(total.ours)
    assert sum(floors.stage for floors in stages.values()) > total.stage


def test_what_was_measured_stands_beside_its_row(tmp_path):
    rows = [
        "network,part,dtype,batch,group,provider,status,median_ms",
        "resnet50,whole,bf16,128,main,fused+graph,ok,7",
        "resnet50,whole,fp16,128,main,fused+graph,ok,3",
        "resnet50,whole,fp16,128,compile,fused+graph,ok,4",
        "resnet50,layer1-4,fp16,128,by-stage,fused+graph,ok,2",
        "resnet50,layer1,fp16,128,by-stage,fused+graph,ok,0.5",
        "resnet50,layer1,fp16,128,by-stage,eager+graph,ok,9",
        "resnet50,layer2.0,fp16,128,main,fused+graph,ok,0.25",
        "resnet50,layer2.1,fp16,128,main,fused+graph,ok,0.125",
        "resnet50,layer3.1,fp16,128,main,fused+graph,failed,",
    ]
    (tmp_path / "bench.csv").write_text("\n".join(rows))
    assert roofline.read_measured(tmp_path / "bench.csv") == {
        ("resnet50", "stem and body", "128"): 3000.0,
        ("resnet50", "body", "128"): 2000.0,
        ("resnet50", "layer1", "128"): 500.0,
        ("resnet50", "l2.first", "128"): 250.0,
        ("resnet50", "l2", "128"): 125.0,
    }


@pytest.mark.parametrize(("options", "name"), [([], "(measured ceilings, L2's fitted: "), (["--assumed"], "(assumed")])
def test_the_roofline_is_that_of_a_measured_chip_unless_told_otherwise(options, name, tmp_path, capsys):
    assert roofline.main([*options, "--out", str(tmp_path / "r.csv")]) == 0
    header, first, *_ = (tmp_path / "r.csv").read_text().splitlines()
    assert header.startswith("chip,")
    assert name in first
    with pytest.raises(SystemExit):
        roofline.main(["--batch", "0"])
    assert "batch must be at least 1, got 0" in capsys.readouterr().err
