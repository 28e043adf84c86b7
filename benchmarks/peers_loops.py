"""The training loops of other projects, each as its documentation shows it; benchmarks/peers.py starts them.

    python benchmarks/peers_loops.py trainer --work FOLDER --output-dir FOLDER [--compile]

They train LlamaForCausalLM (litgpt: its GPT) from the checkpoint and on the windows that peers_prepare.py wrote, with fused AdamW,
and write metrics.jsonl under the names of train_shared.py. `products` trains nothing: it times the matrix products alone.
"""

import argparse
import json
import resource
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

SETTLE_SECONDS = 0.2  # before the first update: peers.py reads the memory of this process in that time
BETAS = (0.9, 0.95)
RANK = 16


class Run:
    """The arguments, and the rows of metrics.jsonl: one every --log-every updates, and one after the last."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments = arguments
        self.folder: Path = arguments.output_dir
        self.checkpoint: Path = arguments.work / "checkpoint"
        self.config = json.loads((self.checkpoint / "config.json").read_text(encoding="utf-8"))
        self.accumulation: int = arguments.batch_size // arguments.micro_batch_size
        self.marks: list[tuple[int, float, float, float]] = []
        self.nats = 0.0

    def begin(self) -> None:
        """The model is built: says so to peers.py and starts the clock."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "settings.json").write_text("{}\n")
        time.sleep(SETTLE_SECONDS)
        self.marks.append((0, time.perf_counter(), 0.0, 0.0))

    def due(self, step: int) -> bool:
        return step % self.arguments.log_every == 0 or step == self.arguments.steps

    def end_update(self, step: int, loss: float) -> None:
        """loss: the mean of the update's tokens, or where `due` that of all updates since the last row."""
        self.nats += loss
        if self.due(step):
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            self.marks.append((step, time.perf_counter(), self.nats, peak))
            self.nats = 0.0

    def write(self) -> None:
        tokens = self.arguments.batch_size * self.config["max_position_embeddings"]
        with open(self.folder / "metrics.jsonl", "w", encoding="utf-8") as file:
            for (before, start, _, _), (step, end, nats, peak) in zip(self.marks, self.marks[1:], strict=False):
                row = {"step": step, "train/loss": nats / (step - before), "train/tokens": step * tokens}
                row |= {"train/tokens_per_second": (step - before) * tokens / (end - start)}
                file.write(json.dumps(row | {"memory/process_peak_mb": peak}) + "\n")


class Windows(Dataset):
    """shift_labels: Transformers' name of labels that belong to the same place, not to the next one."""

    def __init__(self, run: Run):
        self.windows = np.load(run.arguments.work / "windows.npy", mmap_mode="r")

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        window = torch.from_numpy(np.array(self.windows[index]))
        return {"input_ids": window[:-1], "labels": window[1:], "shift_labels": window[1:]}


def llama(run: Run) -> torch.nn.Module:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(
        run.checkpoint, attn_implementation="sdpa", dtype=torch.float32, use_cache=False
    )


def trainer(run: Run) -> None:
    """Transformers' Trainer. Source: huggingface.co/docs/transformers/trainer."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Timing(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            run.begin()

        def on_step_end(self, args, state, control, **kwargs):
            control.should_log = run.due(state.global_step)

        def on_log(self, args, state, control, logs=None, **kwargs):
            if logs and "loss" in logs:  # the mean since the last row
                run.end_update(state.global_step, logs["loss"] * (state.global_step - run.marks[-1][0]))

    given = run.arguments
    arguments = TrainingArguments(
        output_dir=str(run.folder),
        max_steps=given.steps,
        per_device_train_batch_size=given.micro_batch_size,
        gradient_accumulation_steps=run.accumulation,
        learning_rate=given.lr,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        torch_compile=given.compile,
        use_cpu=True,
        train_sampling_strategy="sequential",
        dataloader_num_workers=given.workers,
        remove_unused_columns=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    Trainer(model=llama(run), args=arguments, train_dataset=Windows(run), callbacks=[Timing()]).train()


def accelerate(run: Run, model: torch.nn.Module | None = None) -> None:
    """Accelerate's loop. Source: huggingface.co/docs/accelerate/usage_guides/gradient_accumulation."""
    from accelerate import Accelerator

    accelerator = Accelerator(gradient_accumulation_steps=run.accumulation)  # compiles by ACCELERATE_DYNAMO_BACKEND
    model = model or llama(run)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=run.arguments.lr, betas=BETAS, weight_decay=0.0, fused=True)
    batches = DataLoader(Windows(run), batch_size=run.arguments.micro_batch_size)
    model, optimizer, batches = accelerator.prepare(model, optimizer, batches)
    model.train()
    run.begin()
    nats = 0.0
    for number, batch in enumerate(batches, start=1):
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        nats += loss.item() / run.accumulation
        if accelerator.sync_gradients:
            run.end_update(number // run.accumulation, nats)
            nats = 0.0
        if number == run.arguments.steps * run.accumulation:
            break


def peft(run: Run) -> None:
    """PEFT's LoRA in Accelerate's loop: the matrices, rank, scale and initial values of our kind lora."""
    from peft import LoraConfig, get_peft_model  # pyright: ignore[reportMissingImports]

    count = run.config["num_hidden_layers"]
    layers = list(range(count - count // 2, count))
    names = ["gate_proj", "up_proj", "down_proj"]
    chosen = LoraConfig(
        r=RANK,
        lora_alpha=RANK,
        lora_dropout=0.0,
        target_modules=names,
        layers_to_transform=layers,
        task_type="CAUSAL_LM",
    )
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
    sizes = run.config
    config = Config(
        block_size=sizes["max_position_embeddings"],
        n_layer=sizes["num_hidden_layers"],
        n_embd=sizes["hidden_size"],
        n_head=sizes["num_attention_heads"],
        n_query_groups=sizes["num_key_value_heads"],
        intermediate_size=sizes["intermediate_size"],
        padded_vocab_size=sizes["vocab_size"],
        vocab_size=sizes["vocab_size"],
        rotary_percentage=1.0,
        rope_base=int(sizes["rope_theta"]),
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        norm_eps=sizes["rms_norm_eps"],
        mlp_class_name="LLaMAMLP",
    )
    model, weights = GPT(config), {}
    copy_weights_hf_llama(config, {}, weights, load_file(run.checkpoint / "model.safetensors"))
    model.load_state_dict(weights, strict=True, assign=True)
    model.transformer.wte.weight = model.lm_head.weight
    model = fabric.setup(torch.compile(model) if run.arguments.compile else model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=run.arguments.lr, betas=BETAS, weight_decay=0.0, fused=True)
    optimizer = fabric.setup_optimizers(optimizer)
    windows = fabric.setup_dataloaders(DataLoader(Windows(run), batch_size=run.arguments.micro_batch_size))
    model.train()
    run.begin()
    nats = 0.0
    for number, batch in enumerate(windows, start=1):
        is_accumulating = number % run.accumulation != 0
        with fabric.no_backward_sync(model, enabled=is_accumulating):
            loss = chunked_cross_entropy(model(batch["input_ids"]), batch["labels"])
            fabric.backward(loss / run.accumulation)
        nats += loss.item() / run.accumulation
        if not is_accumulating:
            fabric.clip_gradients(model, optimizer, max_norm=1.0)
            optimizer.step()
            optimizer.zero_grad()
            run.end_update(number // run.accumulation, nats)
            nats = 0.0
        if number == run.arguments.steps * run.accumulation:
            break


def products(run: Run) -> None:
    """FLOP/s of torch.mm for the three products of each linear layer in an update, the median of each; into products.json."""
    rows = run.arguments.micro_batch_size * run.config["max_position_embeddings"]
    shapes = json.loads((run.arguments.work / "work.json").read_text(encoding="utf-8"))["shapes"]
    flops, seconds = 0, 0.0
    for outputs, inputs in dict.fromkeys(map(tuple, shapes)):
        x, gradient = torch.randn(rows, inputs), torch.randn(rows, outputs)
        weight = torch.randn(outputs, inputs)
        for a, b in ((x, weight.T), (gradient, weight), (gradient.T, x)):
            result, times = torch.mm(a, b), []
            while len(times) < 5 or sum(times) < 0.3:
                start = time.perf_counter()
                torch.mm(a, b, out=result)
                times.append(time.perf_counter() - start)
            count = shapes.count([outputs, inputs])
            seconds += count * statistics.median(times)
            flops += count * 2 * rows * inputs * outputs
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / "products.json").write_text(json.dumps({"flops/s": flops / seconds}) + "\n")


if __name__ == "__main__":
    contenders = {function.__name__: function for function in (trainer, accelerate, peft, litgpt, products)}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("contender", choices=contenders)
    parser.add_argument("--work", type=Path, required=True, help="folder that peers_prepare.py wrote")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--batch-size", type=int, required=True, help="windows in an update")
    parser.add_argument("--micro-batch-size", type=int, required=True, help="windows at once")
    parser.add_argument("--steps", type=int, required=True, help="updates")
    parser.add_argument("--log-every", type=int, required=True, help="updates of a row; the first row is not counted")
    parser.add_argument("--lr", type=float, required=True, help="constant learning rate")
    parser.add_argument("--workers", type=int, default=0, help="processes that load data for the Trainer")
    parser.add_argument("--compile", action="store_true", help="torch.compile")
    run = Run(parser.parse_args())
    contenders[run.arguments.contender](run)
    if run.marks:
        run.write()
