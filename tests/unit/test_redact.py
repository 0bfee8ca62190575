"""Credentials do not get through; what merely looks long does."""

from __future__ import annotations

import pytest

from strop.redact import MASK, redact, redact_arguments

HF = "hf_" + "aB3dE6gH9j" * 3 + "kLmN"
AWS = "AKIA" + "ABCDEFGH12345678"
WANDB = "0123456789abcdef" * 2 + "01234567"


@pytest.mark.parametrize(
    "secret",
    [HF, AWS, "ghp_" + "x" * 36, "sk-" + "a1" * 24, "github_pat_" + "A1_" * 20, "wandb_v1_" + "Zz9" * 20],
)
@pytest.mark.parametrize("around", ["{}", "token={}", "https://host/x?t={}&y=1", '{{"k": "{}"}}', "({})"])
def test_known_shapes_are_masked_wherever_they_stand(secret: str, around: str) -> None:
    assert redact(around.format(secret)) == around.format(MASK)


def test_passwords_in_urls_and_aws_secrets_are_masked() -> None:
    assert redact("git clone https://me:pa55word@host/r") == f"git clone https://{MASK}@host/r"
    assert redact(f"AWS_SECRET_ACCESS_KEY={'abc/+' * 8}") == f"AWS_SECRET_ACCESS_KEY={MASK}"


@pytest.mark.parametrize(
    "text",
    [
        "meta-llama/Llama-3.1-8B-Instruct",
        "revision: " + WANDB,
        "sha256: " + "ab12" * 16,
        "learning_rate: 5e-7, micro_batch_tokens: 4096",
        "https://huggingface.co/datasets/Anthropic/hh-rlhf",
        "ask-me-anything-about-long-hyphenated-words",
    ],
)
def test_ordinary_text_stays(text: str) -> None:
    assert redact(text) == text


def test_a_value_from_the_environment_is_masked_where_it_turns_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", WANDB)
    monkeypatch.setenv("KEYBOARD_LAYOUT", "us-international")
    monkeypatch.setenv("SHORT_TOKEN", "yes")
    assert redact(f"key {WANDB} us-international yes") == f"key {MASK} us-international yes"


def test_command_lines() -> None:
    line = [
        "strop",
        "train",
        "--hub-token",
        "whatever",
        "--api_key=abc",
        "--config",
        "c.yaml",
        "WANDB_API_KEY=" + WANDB,
    ]
    assert redact_arguments(line) == [
        "strop", "train", "--hub-token", MASK, f"--api_key={MASK}", "--config", "c.yaml", f"WANDB_API_KEY={MASK}",
    ]  # fmt: skip
    plain = ["--training.micro_batch_tokens", "4096", "--models.0.revision", WANDB, "--models.0.revision=" + WANDB]
    assert redact_arguments(plain) == plain
    assert redact_arguments(["login", WANDB, "--flag=" + WANDB]) == ["login", MASK, f"--flag={MASK}"]
    assert redact_arguments(["--token", "--other", "x"]) == ["--token", "--other", "x"]
