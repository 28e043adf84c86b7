"""The training loops of other projects, each as its documentation shows it; benchmarks/peers.py starts them.

    python benchmarks/peers_loops.py trainer --work FOLDER --output-dir FOLDER ...

They train LlamaForCausalLM (litgpt: its GPT) from the checkpoint and on the windows that peers_prepare.py wrote, with
fused AdamW, and write metrics.jsonl under the names of train_shared.py. `products` trains nothing: it times the matrix
products alone.
"""

import argparse
import json
import resource
import statistics
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

SETTLE_SECONDS = 0.2  # before the first update: peers.py reads the memory of this process in that time
BETAS = (0.9, 0.95)
RANK = 16


class Run:
    """The arguments of a run and the rows of its metrics.jsonl: one every --log-every updates, and one after the last."""

    def __init__(self, given: argparse.Namespace):
        self.given = given
        self.checkpoint: Path = given.work / "checkpoint"
        self.config = json.loads((self.checkpoint / "config.json").read_text(encoding="utf-8"))
        self.accumulation: int = given.batch_size // given.micro_batch_size
        self.micro_batches: int = given.steps * self.accumulation
        self.losses: list[float] = []
        self.mark = (0, 0.0)  # the step and the time of the last row
        given.output_dir.mkdir(parents=True, exist_ok=True)

    def begin(self) -> None:
        """The model is built: says so to peers.py and starts the clock. The pause counts to the first update, which no speed has."""
        self.mark = (0, time.perf_counter())
        (self.given.output_dir / "settings.json").write_text("{}\n")
        time.sleep(SETTLE_SECONDS)

    def due(self, step: int) -> bool:
        return step % self.given.log_every == 0 or step == self.given.steps

    def end_micro_batch(self, loss: float) -> None:
        self.losses.append(loss)
        step, rest = divmod(len(self.losses), self.accumulation)
        if not rest and self.due(step):
            self.row(step, statistics.mean(self.losses[-self.accumulation :]))

    def row(self, step: int, loss: float) -> None:
        now, (before, then) = time.perf_counter(), self.mark
        tokens = self.given.batch_size * self.config["max_position_embeddings"]
        row = {"step": step, "train/loss": loss, "train/tokens": step * tokens}
        row["train/tokens_per_second"] = (step - before) * tokens / (now - then)
        row["memory/process_peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        with open(self.given.output_dir / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self.mark = (step, now)


class Windows(Dataset):
    """shift_labels: Transformers' name of labels that belong to the same place, not to the next one."""

    def __init__(self, run: Run):
        self.windows = np.load(run.given.work / "windows.npy", mmap_mode="r")

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        window = torch.from_numpy(np.array(self.windows[index]))
        return {"input_ids": window[:-1], "labels": window[1:], "shift_labels": window[1:]}


def llama(run: Run) -> Any:
    from transformers import LlamaForCausalLM

    options = {"attn_implementation": "sdpa", "dtype": torch.float32, "use_cache": False}
    return LlamaForCausalLM.from_pretrained(run.checkpoint, **options)


def adamw(run: Run, model: torch.nn.Module) -> torch.optim.Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=run.given.lr, betas=BETAS, weight_decay=0.0, fused=True)


def trainer(run: Run) -> None:
    """Transformers' Trainer. Source: huggingface.co/docs/transformers/trainer."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Timing(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            run.begin()

        def on_step_end(self, args, state, control, **kwargs):
            control.should_log = run.due(state.global_step)

        def on_log(self, args, state, control, logs=None, **kwargs):
            if logs and "loss" in logs:  # the mean of the updates since the last row
                run.row(state.global_step, logs["loss"])

    arguments = TrainingArguments(
        output_dir=str(run.given.output_dir),
        max_steps=run.given.steps,
        per_device_train_batch_size=run.given.micro_batch_size,
        gradient_accumulation_steps=run.accumulation,
        learning_rate=run.given.lr,
        lr_scheduler_type="constant",
        adam_beta2=BETAS[1],
        optim="adamw_torch_fused",
        torch_compile=run.given.compile,
        use_cpu=True,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    Trainer(model=llama(run), args=arguments, train_dataset=Windows(run), callbacks=[Timing()]).train()


def accelerate(run: Run, model: Any = None) -> None:
    """Accelerate's loop. Source: huggingface.co/docs/accelerate/usage_guides/gradient_accumulation."""
    from accelerate import Accelerator

    accelerator = Accelerator(gradient_accumulation_steps=run.accumulation)  # compiles by ACCELERATE_DYNAMO_BACKEND
    model = model or llama(run)
    batches = DataLoader(Windows(run), batch_size=run.given.micro_batch_size)
    prepared: Any = accelerator.prepare(model, adamw(run, model), batches)
    model, optimizer, batches = prepared
    model.train()
    run.begin()
    for batch in islice(batches, run.micro_batches):
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        run.end_micro_batch(loss.item())


def peft(run: Run) -> None:
    """PEFT's LoRA in Accelerate's loop: the matrices, rank, scale and initial values of our kind lora."""
    from peft import LoraConfig, get_peft_model  # pyright: ignore[reportMissingImports]

    count = run.config["num_hidden_layers"]
    layers = list(range(count - count // 2, count))
    names = ["gate_proj", "up_proj", "down_proj"]
    chosen = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=names, layers_to_transform=layers)
    model = get_peft_model(llama(run), chosen)
    torch.manual_seed(42)  # --seed of train_module.py, which draws them in this order
    for layer in layers:
        for name in names:
            a = model.get_submodule(f"base_model.model.model.layers.{layer}.mlp.{name}.lora_A.default").weight
            torch.nn.init.uniform_(a, -(a.shape[1] ** -0.5), a.shape[1] ** -0.5)
    accelerate(run, model)


def litgpt(run: Run) -> None:
    """litgpt's GPT, compiled, in the loop of litgpt/pretrain.py, with its chunked loss; AdamW is fused, there only on a GPU."""
    import lightning  # pyright: ignore[reportMissingImports]
    from litgpt.config import Config  # pyright: ignore[reportMissingImports]
    from litgpt.model import GPT  # pyright: ignore[reportMissingImports]
    from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama  # pyright: ignore[reportMissingImports]
    from litgpt.utils import chunked_cross_entropy  # pyright: ignore[reportMissingImports]
    from safetensors.torch import load_file

    fabric = lightning.Fabric(accelerator="cpu", devices=1, precision="32-true")
    config = Config.from_name(
        "Llama-2-7b-hf",  # with these sizes
        block_size=run.config["max_position_embeddings"],
        n_layer=run.config["num_hidden_layers"],
        n_embd=run.config["hidden_size"],
        n_head=run.config["num_attention_heads"],
        n_query_groups=run.config["num_key_value_heads"],
        intermediate_size=run.config["intermediate_size"],
        padded_vocab_size=run.config["vocab_size"],
        norm_eps=run.config["rms_norm_eps"],
    )
    model, weights = GPT(config), {}
    copy_weights_hf_llama(config, {}, weights, load_file(run.checkpoint / "model.safetensors"))
    model.load_state_dict(weights, strict=True, assign=True)
    model.transformer.wte.weight = model.lm_head.weight
    model = fabric.setup(torch.compile(model))
    optimizer = fabric.setup_optimizers(adamw(run, model))
    batches = fabric.setup_dataloaders(DataLoader(Windows(run), batch_size=run.given.micro_batch_size))
    model.train()
    run.begin()
    for number, batch in enumerate(islice(batches, run.micro_batches), start=1):
        is_accumulating = number % run.accumulation != 0
        with fabric.no_backward_sync(model, enabled=is_accumulating):
            loss = chunked_cross_entropy(model(batch["input_ids"]), batch["labels"])
            fabric.backward(loss / run.accumulation)
        if not is_accumulating:
            fabric.clip_gradients(model, optimizer, max_norm=1.0)
            optimizer.step()
            optimizer.zero_grad()
        run.end_micro_batch(loss.item())


def products(run: Run) -> None:
    """FLOP/s of torch.mm for the three products of each linear layer in an update, the median of each; into products.json."""
    rows = run.given.micro_batch_size * run.config["max_position_embeddings"]
    shapes = json.loads((run.given.work / "work.json").read_text(encoding="utf-8"))["shapes"]
    flops, seconds = 0, 0.0
    for outputs, inputs in set(map(tuple, shapes)):
        x, gradient, weight = torch.randn(rows, inputs), torch.randn(rows, outputs), torch.randn(outputs, inputs)
        for a, b in ((x, weight.T), (gradient, weight), (gradient.T, x)):
            result, times = torch.mm(a, b), []
            while len(times) < 5 or sum(times) < 0.3:
                start = time.perf_counter()
                torch.mm(a, b, out=result)
                times.append(time.perf_counter() - start)
            seconds += shapes.count([outputs, inputs]) * statistics.median(times)
            flops += shapes.count([outputs, inputs]) * 2 * rows * inputs * outputs
    (run.given.output_dir / "products.json").write_text(json.dumps({"FLOP/s": flops / seconds}) + "\n")


if __name__ == "__main__":
    contenders = {function.__name__: function for function in (trainer, accelerate, peft, litgpt, products)}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("contender", choices=contenders)
    for name in ("--work", "--output-dir"):
        parser.add_argument(name, type=Path, required=True)
    for name in ("--batch-size", "--micro-batch-size", "--steps", "--log-every"):
        parser.add_argument(name, type=int, required=True, help="as in train_shared.py")
    parser.add_argument("--lr", type=float, required=True, help="constant learning rate")
    parser.add_argument("--compile", action="store_true", help="torch.compile of the Trainer")
    given = parser.parse_args()
    contenders[given.contender](Run(given))
