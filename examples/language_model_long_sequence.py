"""A language model on long sequences of bytes, in Hugging Face's Trainer, within a device memory budget.

    python examples/language_model_long_sequence.py --text book.txt --tokens 65536 --hidden 1024 --layers 16

It is a Llama of your size with random weights; without --text it learns the source of this library.
Activations grow with the sequence: --tokens is what LMS lets you raise.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import torchlms
from torchlms.integrations.huggingface import LMSCallback

ON_GPU = torch.cuda.is_available()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", default=None if ON_GPU else "48MiB", help="such as 16GiB")
    parser.add_argument("--text", type=Path, help="any file to learn from")
    parser.add_argument("--tokens", type=int, default=16384 if ON_GPU else 1024, help="length of a sequence")
    parser.add_argument("--hidden", type=int, default=1024 if ON_GPU else 128)
    parser.add_argument("--layers", type=int, default=12 if ON_GPU else 4)
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=options.hidden,
            intermediate_size=3 * options.hidden,
            num_hidden_layers=options.layers,
            num_attention_heads=max(1, options.hidden // 64),
            max_position_embeddings=options.tokens,
            bos_token_id=None,
            eos_token_id=None,
            use_cache=False,
        )
    )
    callback = LMSCallback(budget=options.budget)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=tempfile.mkdtemp(),
            max_steps=options.steps,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=2,
            learning_rate=1e-3,
            bf16=ON_GPU,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=Bytes(text(options.text), options.tokens),
        callbacks=[callback],  # this line is all
    )
    trainer.train()
    print(callback.lms.report())


class Bytes(Dataset[dict[str, torch.Tensor]]):
    """A text cut into sequences; every byte is a token."""

    def __init__(self, data: bytes, tokens: int) -> None:
        if len(data) < tokens:
            raise SystemExit(f"the text has {len(data)} bytes, less than one sequence of --tokens {tokens}")
        whole = torch.frombuffer(bytearray(data), dtype=torch.uint8).long()
        self.rows = whole[: len(whole) // tokens * tokens].view(-1, tokens)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def text(path: Path | None) -> bytes:
    if path is not None:
        return path.read_bytes()
    sources = Path(torchlms.__file__).parent.rglob("*.py")
    return b"".join(source.read_bytes() for source in sorted(sources))


if __name__ == "__main__":
    main()
