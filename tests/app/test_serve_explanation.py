"""What the page of `cbam serve` shows, without the page."""

import base64
import io
import re
import threading

import pytest
import torch

import cbam
from cbam.app.explanation import CAPACITY, DisplayOptions, ExpiredError, Explainer, error_text, parse_options
from cbam.errors import CBAMError, DataError, InputError
from cbam.explain import Viewer

Image = pytest.importorskip("PIL.Image", reason="pictures are read by Pillow")
numpy = pytest.importorskip("numpy")
pytest.importorskip("torchcam", reason="Grad-CAM is torchcam's")
pytest.importorskip("matplotlib", reason="colours are matplotlib's")


@pytest.fixture(scope="module")
def explainer():
    torch.manual_seed(0)
    nets = {"plain": cbam.build("resnet_tiny"), "CBAM": cbam.build("resnet_tiny+cbam")}
    for module in nets["CBAM"].modules():
        if isinstance(module, cbam.SpatialAttention):
            torch.nn.init.normal_(module.bn.weight)
    names = ["<b>bold</b>", *(f"class {i}" for i in range(1, 1000))]
    return Explainer(Viewer(nets, names, size=32, resized=36))


def picture(number: int = 0, kind: str = "PNG", **how) -> bytes:
    pixels = torch.randint(0, 256, (48, 40, 3), generator=torch.Generator().manual_seed(number))
    buffer = io.BytesIO()
    Image.fromarray(pixels.byte().numpy()).save(buffer, kind, **how)
    return buffer.getvalue()


def test_a_page_holds_the_image_the_maps_and_the_gates_of_a_stage(explainer):
    key = explainer.add(picture(), "photo.png")
    stage = explainer.stage_names()[0]
    page = explainer.page(key, DisplayOptions(stage=stage, target=7))
    assert "Grad-CAM, plain" in page
    assert "Grad-CAM, CBAM" in page
    assert f"CBAM, {stage}: " in page
    assert "where: spatial gate" in page
    assert "channels kept most" in page
    for one in explainer.look(key, DisplayOptions(target=7)).glances:
        assert f"p = {one.probability:.3f}" in page
    images = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(images) == 15
    for data in images:
        assert Image.open(io.BytesIO(base64.b64decode(data))).format == "PNG"
    assert "http" not in page


@pytest.mark.parametrize("start", ["paper", "identity"])
def test_the_middle_of_the_gates_changes_nothing_only_after_an_identity_start(start):
    torch.manual_seed(0)
    nets = {"CBAM": cbam.build("resnet_tiny+cbam", start=start)}
    explainer = Explainer(Viewer(nets, [f"class {i}" for i in range(1000)], size=32, resized=36))
    page = explainer.page(explainer.add(picture(), "photo.png"), DisplayOptions())
    assert ("dashed: changes nothing" in page) == (start == "identity")
    assert ("dashed: middle of the range;\n1 changes nothing" in page) == (start == "paper")
    assert ("channels kept most" in page) == (start == "paper")
    assert ("channels with the largest gates" in page) == (start == "identity")


def test_below_the_threshold_and_without_opacity_the_image_is_grey(explainer):
    key = explainer.add(picture(), "photo.png")

    def map_of(**how):
        page = explainer.page(key, DisplayOptions(**how))
        data = re.findall(r'src="data:image/png;base64,([^"]+)"', page)[1]
        return torch.from_numpy(numpy.array(Image.open(io.BytesIO(base64.b64decode(data)))))

    grey = map_of(opacity=0.0)
    assert (grey == grey[..., :1]).all()
    whole, part = map_of(), map_of(threshold=0.5)
    heat = explainer.look(key, DisplayOptions()).glances[0].heat
    coloured = heat >= 0.5
    assert coloured.any()
    assert not coloured.all()
    assert torch.equal(part[coloured], whole[coloured])
    assert torch.equal(part[~coloured], grey[~coloured])


def test_names_are_written_as_text(explainer):  # W13
    key = explainer.add(picture(), "<script>alert(1)</script>.png")
    page = explainer.page(key, DisplayOptions(target=0))
    assert "&lt;b&gt;bold&lt;/b&gt;" in page
    assert "<b>" not in page
    assert "<script" not in page


def test_image_metadata_is_not_returned(explainer):  # W14
    exif = Image.Exif()
    exif[0x010E] = "home address"
    exif.get_ifd(0x8825)[1] = "N"
    key = explainer.add(picture(0, "JPEG", exif=exif), "photo.jpg")
    page = explainer.page(key, DisplayOptions())
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert pictures
    for data in pictures:
        content = base64.b64decode(data)
        assert b"home address" not in content
        assert not Image.open(io.BytesIO(content)).getexif()


def test_oversized_animated_and_invalid_images_are_refused(explainer):  # W1 W3 W4 D7 D9
    frames = [Image.new("L", (8, 8), value) for value in (0, 255)]
    gif, wide = io.BytesIO(), io.BytesIO()
    frames[0].save(gif, "GIF", save_all=True, append_images=frames[1:])
    Image.new("1", (5001, 5001)).save(wide, "PNG")
    for data, message in (
        (b"\0" * 10_000_001, "the limit is 10 MB"),
        (wide.getvalue(), "25 megapixels; the limit is 25"),
        (gif.getvalue(), "animation"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
        (b"<html>", "not an image"),
        (b"", "empty file"),
        (picture()[:500], "damaged"),
    ):
        with pytest.raises(DataError, match=message):
            explainer.add(data, "x")


def test_the_page_keeps_the_class_of_the_number_where_names_are_twice():
    from cbam.app.serve import _Handlers

    net = cbam.build("resnet_tiny", num_classes=4)
    torch.nn.init.zeros_(net.fc.weight)
    with torch.no_grad():
        net.fc.bias.copy_(torch.tensor([0.0, 0, 0, 9]))
    explainer = Explainer(Viewer({"net": net}, ["dog", "crane", "cat", "crane"], size=32))
    key = explainer.add(picture(), "x")
    assert explainer.look(key, DisplayOptions()).index == 3
    taken = _Handlers(explainer)._show_new(lambda: (picture(), "x"), "gradcam", None, 0.0, 0.5)
    assert taken[1] == 3
    assert "predicts crane (3)" in explainer.page(key, DisplayOptions(target=1))


def test_a_phone_photo_with_an_embedded_preview_is_accepted(explainer):  # D7
    photo, file = Image.open(io.BytesIO(picture())), io.BytesIO()
    photo.save(file, "MPO", save_all=True, append_images=[photo.resize((20, 24))])
    key = explainer.add(file.getvalue(), "phone.jpg")
    assert explainer.look(key, DisplayOptions()).image.shape == (3, 32, 32)


def test_a_large_image_is_refused_before_it_is_decoded(explainer, monkeypatch):  # W4
    import cbam.app.explanation as module

    wide = io.BytesIO()
    Image.new("1", (9000, 9000)).save(wide, "PNG")
    monkeypatch.setattr(module, "decode", lambda _: pytest.fail("it was decoded"))
    with pytest.raises(DataError, match="81 megapixels"):
        explainer.add(wide.getvalue(), "x")


def test_the_oldest_images_are_dropped_and_a_key_opens_only_its_own(explainer):  # W6
    first = explainer.add(picture(), "first")
    keys = [explainer.add(picture(i), str(i)) for i in range(CAPACITY)]
    assert len({first, *keys}) == CAPACITY + 1
    with pytest.raises(ExpiredError, match="upload it again"):
        explainer.page(first, DisplayOptions())
    with pytest.raises(ExpiredError):
        explainer.page("../../etc/passwd", DisplayOptions())
    assert explainer.look(keys[3], DisplayOptions()).name == "3"


def test_of_many_looks_at_an_image_the_gates_of_its_stages_are_kept_once():
    torch.manual_seed(0)
    net = cbam.build("resnet18+cbam", num_classes=9).eval()
    explainer = Explainer(Viewer({"CBAM": net}, [f"class {i}" for i in range(9)], size=64))
    key = explainer.add(picture(), "x")
    looks = [explainer.look(key, DisplayOptions(target=i)) for i in range(8)]
    assert list(looks[0].blocks["CBAM"]) == explainer.stage_names()
    held = {
        tensor.data_ptr(): tensor.nbytes
        for one in looks
        for block in one.blocks["CBAM"].values()
        for tensor in (block.before, block.after, *(step.after for step in block.steps))
    }
    maps = 4 * sum(
        c * (16 // s) ** 2 for c, s in ((64, 1), (128, 2), (256, 4), (512, 8))
    )  # bytes, of one each
    assert sum(held.values()) == 4 * maps
    assert explainer.page(key, DisplayOptions(target=1)) == explainer.page(key, DisplayOptions(target=1))


def test_200_interleaved_requests_each_equal_the_serial_answer(explainer):  # W10
    names = explainer.stage_names()
    keys = [explainer.add(picture(i), str(i)) for i in range(10)]
    wanted = [
        (
            keys[i % 10],
            DisplayOptions(
                target=i % 7 or None, stage=names[i % len(names)], method=("gradcam", "layercam")[i % 2]
            ),
        )
        for i in range(200)
    ]
    serial = Explainer(explainer.viewer)
    serial._pictures.update(explainer._pictures)
    expected = {one: serial.page(*one) for one in dict.fromkeys(wanted)}
    answers: dict[int, str] = {}

    def ask(start: int) -> None:
        for i in range(start, 200, 8):
            answers[i] = explainer.page(*wanted[i])

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answers[i] for i in range(200)] == [expected[one] for one in wanted]


def test_a_crash_is_reported_by_number_and_the_next_answer_is_right(explainer, monkeypatch, caplog):  # W12
    key = explainer.add(picture(), "photo")
    before = explainer.page(key, DisplayOptions(target=3))
    explainer._looks.clear()
    net = explainer.viewer.networks["CBAM"]
    monkeypatch.setattr(net, "forward", lambda x: 1 / 0)
    with pytest.raises(ZeroDivisionError) as caught:
        explainer.page(key, DisplayOptions(target=3))
    told = error_text(caught.value)
    assert re.fullmatch(
        r"This image could not be explained \(error [0-9a-f]{8}\)\. See the server log\.", told
    )
    assert "ZeroDivision" not in told
    assert told.split("error ")[1][:8] in caplog.text
    monkeypatch.undo()
    assert explainer.page(key, DisplayOptions(target=3)) == before
    assert error_text(InputError("plain words")) == "plain words"


def test_the_figure_is_a_png_of_the_maps_as_they_are_shown(explainer):
    key = explainer.add(picture(), "photo")
    whole = explainer.figure(key, DisplayOptions())
    assert whole.startswith(b"\x89PNG")
    assert explainer.figure(key, DisplayOptions()) == whole
    for how in ({"threshold": 0.5}, {"opacity": 0.3}, {"target": 7}):
        assert explainer.figure(key, DisplayOptions(**how)) != whole


def test_what_cannot_be_shown_leaves_its_reason_and_nothing_of_the_image_before(explainer):
    from cbam.app.serve import _Handlers

    handlers, how = _Handlers(explainer), ("gradcam", None, 0.0, 0.5)
    key, _, page, _ = handlers._show_new(lambda: (picture(), "x"), *how)
    assert "Grad-CAM" in page
    gone = handlers._show_new(lambda: (b"<html>", "corrupt.png"), *how)
    assert gone[:2] == ("", None)
    assert gone[2].startswith('<p role="alert">not an image (starts with &#x27;&lt;html')
    explainer._pictures.pop(key)
    assert "upload it again" in handlers.show(key, None, *how)


def test_networks_with_different_blocks_each_show_their_own_stage():
    nets = [cbam.build("resnet_tiny+cbam") for _ in range(2)]
    nets = {"first": nets[0], "second": torch.nn.Sequential(nets[1])}
    explainer = Explainer(Viewer(nets, [f"class {i}" for i in range(1000)], size=32, resized=36))
    key, names = explainer.add(picture(), "photo.png"), explainer.stage_names()
    inner = [name for name in names if not name.startswith("0.")]
    assert names == [*inner, *(f"0.{name}" for name in inner)]
    for stage, shown in ((names[0], (names[0], names[-1])), (names[-1], (inner[-1], names[-1]))):
        page = explainer.page(key, DisplayOptions(stage=stage))
        assert f">first, {shown[0]}: " in page
        assert f">second, {shown[1]}: " in page


def test_an_unknown_stage_is_named(explainer):
    key = explainer.add(picture(), "photo")
    with pytest.raises(InputError, match="no stage 'x'; expected one of "):
        explainer.page(key, DisplayOptions(stage="x"))


ODD = [
    None, True, -1, 0, 3, 999, 1000, 2**70, 0.5, -0.5, 1.5, float("nan"), float("inf"), "", "gradcam",
    "layercam", "scorecam", "../../etc/passwd", "<script>", "\0", "x" * 10_000, [], {}, [1], {"path": "/"},
]  # fmt: skip


def test_any_request_is_answered_or_refused_with_a_message(explainer):  # W17
    """2,000 requests of anything in every place: a page, or one of our own refusals."""
    random = numpy.random.default_rng(0)
    names = [*explainer.stage_names(), None]
    keys = [explainer.add(picture(i), str(i)) for i in range(3)]
    answered, refused = 0, []
    for _ in range(2000):
        wanted = [keys[0], 7, "gradcam", names[random.integers(len(names))], 0.2, 0.6]
        for place in random.choice(6, random.integers(0, 3), replace=False):
            wanted[place] = ODD[random.integers(len(ODD))] if place else [*keys, *ODD][random.integers(9)]
        try:
            page = explainer.page(wanted[0], parse_options(*wanted[1:]))
        except CBAMError as error:
            refused.append(error_text(error))
        else:
            answered += 1
            assert page.startswith('<div class="cbam-row">')
            assert "<script" not in page
    assert answered > 300
    assert len(refused) > 300
    assert max(map(len, refused)) <= 400


def test_any_upload_is_accepted_or_refused_with_a_message(explainer):  # W3 W17
    """2,000 files: images with bytes changed, cut off, put together, and none at all."""
    random = numpy.random.default_rng(0)
    kinds = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF")
    whole = [picture(i, kind) for i, kind in enumerate(kinds)]
    taken, refused = 0, []
    for _ in range(2000):
        data = bytearray(whole[random.integers(len(whole))])
        for at in random.integers(0, len(data), random.integers(0, 6)):
            data[at] = random.integers(256)
        if random.random() < 0.3:
            del data[random.integers(len(data)) :]
        if random.random() < 0.1:
            data = bytearray(random.bytes(200))
        try:
            explainer.add(bytes(data), "x")
        except DataError as error:
            refused.append(error_text(error))
        else:
            taken += 1
    assert taken > 200
    assert len(refused) > 200
    assert all(refused)


@pytest.mark.large
def test_1000_requests_leave_no_file(tmp_path, monkeypatch):  # W15
    """What the page does with an upload, a thousand times, some no images: nothing is left on the disk."""
    import tempfile

    from cbam.app import serve

    torch.manual_seed(0)
    nets = {"plain": cbam.build("resnet_tiny"), "CBAM": cbam.build("resnet_tiny+cbam")}
    explainer = Explainer(Viewer(nets, [f"class {i}" for i in range(1000)], size=16, resized=16))
    handlers = serve._Handlers(explainer)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    stage = explainer.stage_names()[0]
    for i in range(1000):
        upload = tmp_path / f"{i}.png"
        upload.write_bytes(b"<html>" if i % 10 == 9 else picture(i % 7))
        key, target, *_ = handlers.upload(str(upload), "gradcam", stage, 0.0, 0.6)
        assert (key == "") == (i % 10 == 9)
        if i % 50 == 0:
            assert handlers.figure(key, target, "gradcam", stage, 0.0, 0.6).startswith("data:image/png")
        assert list(tmp_path.iterdir()) == []
    assert len(explainer._pictures) == len(explainer._looks) == CAPACITY
