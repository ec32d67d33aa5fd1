"""The app end to end: a real browser edits a LoRA, and stock diffusers draws what was asked for with the download."""

from __future__ import annotations

import io as stdio
import json
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from served import ANYBODY, CHROMIUM_ARGS, PATIENCE, ROOT, App, Client, chromium, same_folder

from demos.passages import PASSAGES
from lolgen import io, pictures, pipeline, preview
from lolgen.paths import checkpoints_dir
from lolgen.probe import Probe
from lolgen.testing import random_lora

GLASSES = list(pictures.ATTRIBUTES).index("glasses")


@pytest.fixture(scope="module")
def pipe() -> Any:
    return preview.load_pipeline(checkpoints_dir() / "tiny-sd")


def with_glasses(pipe: Any, folder: Path, file: Path) -> float:
    """Share of pictures with glasses, drawn by stock diffusers with `file`, read by the probe."""
    pipe.load_lora_weights(folder, weight_name=file.name)
    try:
        drawn = preview.draw(pipe, ["a photo of sks person"], range(20, 32))
    finally:
        pipe.unload_lora_weights()
    read = Probe.load(checkpoints_dir() / "probe.safetensors").read(drawn * 2 - 1)
    return float((read[:, GLASSES] == 1).float().mean())


def test_a_browser_edits_and_diffusers_draws_the_change(app: App, pipe: Any, tmp_path: Path) -> None:
    from playwright.sync_api import expect, sync_playwright

    foreign: list[str] = []
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium(), args=CHROMIUM_ARGS)
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.on(
            "request",
            lambda r: foreign.append(r.url) if not r.url.startswith((app.url, "data:", "blob:")) else None,
        )
        page.set_default_timeout(PATIENCE)
        faults: list[str] = []
        page.on("pageerror", lambda e: faults.append(str(e)))
        page.goto(app.url)
        page.get_by_role("tab", name="Edit", exact=True).click()
        page.locator(".ll-picker button[data-name=Ruby]:visible").click()
        page.locator("#edit-glasses").get_by_text("yes", exact=True).click()
        page.click("#edit-go")
        panel = page.locator("#edit-result .ll-panel")
        panel.wait_for(timeout=PATIENCE)
        files = {}
        for name, where in {"after": panel, "before": None}.items():
            if where is None:
                page.get_by_role("tab", name="Inspect", exact=True).click()
                page.locator(".ll-picker button[data-name=Ruby]:visible").click()
                page.click("#inspect-go")
                where = page.locator("#inspect-result .ll-panel")
                where.wait_for(timeout=PATIENCE)
            with page.expect_download() as coming:
                where.locator("a[data-format=diffusers]").click()
            files[name] = tmp_path / f"{name}.safetensors"
            coming.value.save_as(files[name])
        text = panel.inner_text() if panel.is_visible() else panel.text_content() or ""
        assert "Ruby + glasses" in text and "asked" in text
        assert page.locator("#gallery article").count() == 1
        # Two chips quickly after each other: the passage is the last one's.
        page.get_by_role("tab", name="Speak", exact=True).click()
        for name in ("Abraham Lincoln", "Ronald Reagan"):
            page.locator("#speak-sources").get_by_text(name).click()
        expect(page.locator("#speak-passage textarea")).to_have_value(PASSAGES["reagan"], timeout=PATIENCE)
        for width in (1280, 390):
            page.set_viewport_size({"width": width, "height": 844})
            for tab in ("Generate", "Edit", "Mix", "Inspect", "Speak"):
                page.get_by_role("tab", name=tab, exact=True).click()
                assert page.evaluate("document.documentElement.scrollWidth") <= width, (tab, width)
        browser.close()
    assert foreign == [] and faults == []
    assert with_glasses(pipe, tmp_path, files["before"]) <= 0.25
    assert with_glasses(pipe, tmp_path, files["after"]) >= 0.75


# -- answers are those of the library


def test_generate_gives_the_file_of_the_command_line(visitor: Client, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    chips = ["hat", "any", "yes", "any", "any", "any"]
    answer = visitor.call("generate", [*chips, 7, 4])
    assert answer["success"]
    page = answer["output"]["data"][0]
    made = pipeline.generate({"top": "hat", "glasses": "yes"}, tmp_path / "cli", seed=7)
    same_folder(visitor.download(page, "peft"), Path(made["adapter"]))
    for format in ("diffusers", "kohya"):
        (tmp_path / f"{format}.safetensors").write_bytes(visitor.download(page, format))
        assert io.detect(tmp_path / f"{format}.safetensors") == format
        assert pipeline.compare(made["adapter"], tmp_path / f"{format}.safetensors")["cosine"] > 0.99999
    assert page.count("<img") == 6 and "Hair colour" in page


def test_an_upload_is_inspected_and_goes_back_unchanged(visitor: Client, tmp_path: Path) -> None:
    made = pipeline.generate({"beard": "yes"}, tmp_path / "b.safetensors", seed=3, format="kohya")
    data = Path(made["adapter"]).read_bytes()
    answer = visitor.call("inspect_upload", [[visitor.sent("my beard.safetensors", data)]])
    assert answer["success"]
    page = answer["output"]["data"][0]
    assert "my beard" in page and "kohya" in page and "Beard" in page
    (tmp_path / "back.safetensors").write_bytes(visitor.download(page, "diffusers"))
    assert pipeline.compare(made["adapter"], tmp_path / "back.safetensors")["relative_distance"] < 1e-5


def test_an_upload_for_another_base_is_described_not_drawn(visitor: Client, tmp_path: Path) -> None:
    from lolgen.lora import ModuleSpec, Spec

    lora = random_lora(Spec((ModuleSpec("unet.down_blocks.0.attentions.0.to_q", 32, 16),)), 2)
    file = io.save(lora, tmp_path / "other.safetensors", "diffusers")
    page = visitor.call("inspect_upload", [[visitor.sent("other.safetensors", file.read_bytes())]])["output"][
        "data"
    ][0]
    assert "another base model" in page and "<img" not in page


def test_a_mix_is_that_of_the_library(visitor: Client, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    made = {}
    for seed in (11, 12):
        answer = visitor.call("generate", [*ANYBODY, seed, 4])["output"]["data"]
        made[seed] = answer[2]["props"]["choices"][0]["id"]
        pipeline.generate({}, tmp_path / str(seed), seed=seed)
    page = visitor.call("mix", [made[11], made[12], 0.5])["output"]["data"][0]
    assert page.count("<img") == 5 * 2 + 3 and page.count("ll-chosen") == 1
    expected = pipeline.mix(tmp_path / "11", tmp_path / "12", tmp_path / "mix", t=0.5, format="peft")
    same_folder(visitor.download(page, "peft"), Path(expected["adapter"]))
    assert "both" in visitor.error("mix", [made[11], made[11], 0.5])


def test_a_picture_becomes_a_lora(visitor: Client, tmp_path: Path) -> None:
    who = {
        "top": "short",
        "hair_color": "blonde",
        "glasses": "yes",
        "beard": "yes",
        "skin": "pale",
        "clothes": "green",
    }
    pixels = pictures.draw_portrait(pictures.Identity(who), np.random.default_rng(0), 128)
    buffer = stdio.BytesIO()
    Image.fromarray(pixels.transpose(1, 2, 0)).save(buffer, "PNG")
    assert visitor.call("take_picture", [visitor.sent("me.png", buffer.getvalue())])["success"]
    page = visitor.call("from_picture", [0, 4])["output"]["data"][0]
    (tmp_path / "me.safetensors").write_bytes(visitor.download(page, "diffusers"))
    read = pipeline.predict([tmp_path / "me.safetensors"])[0]["attributes"]
    assert {n: read[n]["value"] for n in who} == who
    assert "PNG, JPEG or WebP" in visitor.error("take_picture", [visitor.sent("x.png", b"no picture")])


# -- nothing but uploads is read, and errors are one line


def fake(path: str) -> dict[str, Any]:
    return {"path": path, "orig_name": "a.safetensors", "meta": {"_type": "gradio.FileData"}}


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", str(ROOT / "pyproject.toml"), "../../etc/passwd", "http://127.0.0.1:9/a.safetensors", ""],
)
def test_a_path_that_a_client_names_is_refused(visitor: Client, path: str) -> None:
    for name, data in {
        "inspect_upload": [[fake(path)]],
        "take": [[fake(path)]],
        "take_picture": [fake(path)],
        "generate": [fake(path), *ANYBODY[1:], 0, 4],
        "inspect": [fake(path)],
        "edit": [fake(path), *["keep"] * 6, 1, "All the rest"],
    }.items():
        text = visitor.error(name, data)
        assert "upload" in text and "root:" not in text and (not path or path not in text), (name, text)


def test_files_of_the_machine_are_not_served(visitor: Client) -> None:
    for path in ("/etc/passwd", str(ROOT / "pyproject.toml"), str(ROOT / "README.md")):
        for url in (f"/gradio_api/file={path}", f"/file={path}", f"/lolgen/file/..%2F..%2F..{path}/peft"):
            assert visitor.http.get(url).status_code in (403, 404, 405), url
    for id in ("x", "%2e%2e", "a" * 5000):
        assert visitor.http.get(f"/lolgen/file/{id}/peft").status_code == 404


def test_bad_uploads_are_one_line(visitor: Client, app: App) -> None:
    bomb = stdio.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("a.safetensors", bytes(70 * 2**20))
    for file, data, words in (
        ("a.safetensors", b"no", "a.safetensors"),
        ("adapter_model.bin", b"\x80\x04.", "pickle"),
        ("b.zip", bomb.getvalue(), "unpacks to more than"),
        ("<script>.safetensors", b"\x80\x04.", "pickle"),
    ):
        text = visitor.error("inspect_upload", [[visitor.sent(file, data)]])
        assert words in text and "\n" not in text and "Traceback" not in text and str(app.temp) not in text, (
            text
        )
        assert "<" not in text, "toasts are HTML"


def test_an_upload_beyond_the_limit_is_refused_before_it_is_stored(visitor: Client, app: App) -> None:
    before = set(app.files())
    assert visitor.upload("big.safetensors", bytes(66 * 2**20)).status_code == 413

    def untold() -> Iterator[bytes]:
        yield b"x"

    assert visitor.http.post("/gradio_api/upload", content=untold()).status_code == 413
    assert set(app.files()) == before


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("generate", [*ANYBODY, -1, 4], "seed"),
        ("generate", [*ANYBODY, 0, 65], "64"),
        ("generate", [*ANYBODY, 0, "x"], ""),
        ("generate", [*ANYBODY, None, 4], "seed"),
        ("generate", ["wig", *ANYBODY[1:], 0, 4], "wig"),
        ("edit", ["nobody", "bald", *["keep"] * 5, 1, "All the rest"], "gone"),
        ("edit", ["Ruby", *["keep"] * 6, 1, "All the rest"], "nothing to change"),
        ("edit", [None, "bald", *["keep"] * 5, 9, "All the rest"], ""),
        ("mix", [None, None, 0.5], "gone"),
        ("inspect", [{"a": [1]}], "gone"),
        ("from_picture", [0, 4], "picture"),
    ],
)
def test_bad_values_are_one_line(visitor: Client, name: str, data: list[Any], words: str) -> None:
    text = visitor.error(name, data)
    assert words in text.lower() and text not in ("", "None") and "\n" not in text and "Traceback" not in text


def test_the_next_visitor_does_not_see_what_the_last_one_made(visitor: Client, app: App) -> None:
    answer = visitor.call("generate", [*ANYBODY, 5, 4])
    ids = {c["id"] for c in answer["output"]["data"][2]["props"]["choices"]}
    other = Client(app.url, "somebody-else")
    seen = {
        c["id"] for c in other.call("generate", [*ANYBODY, 6, 4])["output"]["data"][2]["props"]["choices"]
    }
    examples = ids & seen
    assert len(examples) == 4 and len(ids) == 5
    (mine,) = ids - seen
    assert "gone" in other.error("inspect", [mine])
    other.close()


# -- the command


def test_a_taken_port_is_one_line(app: App) -> None:
    taken = app.url.rsplit(":", 1)[1]
    for port, words in {
        taken: f"port {taken} on 127.0.0.1 cannot be had",
        "70000": "wanted 1 to 65535",
    }.items():
        command = [sys.executable, "-m", "lolgen.cli", "demo", "--port", port]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert done.stderr.startswith("lolgen: ") and words in done.stderr and "--port" in done.stderr


def test_no_page_about_the_interface(visitor: Client) -> None:
    config = visitor.http.get("/config").json()
    assert config["footer_links"] == [] and not config["analytics_enabled"]
    assert visitor.http.get("/docs").status_code == 404
    css = visitor.http.get("/theme.css").text + json.dumps(config)
    assert "fonts.googleapis" not in css and "cdn" not in json.dumps(config["css"] or "")
