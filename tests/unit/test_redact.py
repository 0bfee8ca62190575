"""Credentials do not get through; what merely looks long does."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

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


JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9P"
KEY = "-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\n\nMIIEpAIBAAK+/x==\n-----END RSA PRIVATE KEY-----"
PGP = "-----BEGIN PGP PRIVATE KEY BLOCK-----\nlQOYBF+a\n-----END PGP PRIVATE KEY BLOCK-----"
NAMED = {
    "Server=db;User Id=sa;Password={};Encrypt=true": "Xy7!abc",
    "host=db user=me password={} sslmode=require": "hunter",
    "DefaultEndpointsProtocol=https;AccountKey={};EndpointSuffix=x": "abc123==",
    "Endpoint=sb://x/;SharedAccessKey={}": "abc+123=",
    "postgres://{}@db.example.com:5432/x": "me:p/a@ss:w0rd",
    "mongodb+srv://{}@c0.example.net/?retry=true": "me:pa55",
    "DB_PASSWORD={}": "hunter22",
    "passphrase: {}": "correct horse battery staple",
    'ssh_passphrase = "{}"': "correct horse; battery",
    "client-secret: {}": "a1b2c3d4",
    "refresh_token={}&x=1": "a1b2.c3",
}


@pytest.mark.parametrize("wrap", [str, json.dumps, lambda text: json.dumps({"raw": json.dumps(text)})])
@pytest.mark.parametrize("secret", [JWT, KEY, PGP])
def test_tokens_and_keys_are_masked_with_all_their_lines(secret: str, wrap: Callable[[str], str]) -> None:
    assert redact(wrap(f"before {secret} after")) == wrap(f"before {MASK} after")
    cut = redact(wrap(f"before {KEY[:60]}"))  # a key whose end is missing
    assert "MIIE" not in cut and cut == wrap(f"before {MASK}")


@pytest.mark.parametrize("wrap", [str, json.dumps, lambda text: json.dumps({"raw": json.dumps(text)})])
@pytest.mark.parametrize(("text", "secret"), NAMED.items())
def test_passwords_under_their_names_are_masked(text: str, secret: str, wrap: Callable[[str], str]) -> None:
    found = redact(wrap(text.format(secret)))
    assert found == wrap(text.format(MASK)) == redact(found)


@pytest.mark.share(3)
@pytest.mark.parametrize(
    "piece", ["-----BEGIN PRIVATE KEY-----", "password=", "a-", "://", "://a:", "eyJaaaaaaa.", "password: '", "pwd:\\"]
)
def test_long_texts_take_no_longer_than_they_are_long(piece: str) -> None:
    start = time.process_time()
    redact(piece * (300_000 // len(piece)))
    assert time.process_time() - start < 5  # a tenth of a second; quadratic, it would be minutes


@pytest.mark.parametrize(
    "text",
    [
        "https://localhost:8080/users/@me",
        "What is a password? It keeps others out.",
        "eos_token: </s>, pad_token: <pad>, num_tokens=4096",
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
