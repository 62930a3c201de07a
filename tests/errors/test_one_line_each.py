"""Every mistake a command line can hold: one clear line, exit code 2, no traceback, nothing written.

A row is the command line, words that its message must hold, and, where it matters, the world it is typed in. `{name}`
is a place of conftest.py; a command line runs in an empty folder. Converters of damaged files have their own table in
tests/conversion/test_malformed.py, flags of convert.py that need each other in tests/test_convert_cli.py.
"""

import re

import pytest

from .conftest import snapshot


QAT = "--config {small-quant.yaml} --data_dir {data} "
SMALL = "--config {small.yaml} --data_dir {data} "  # a recipe and pictures that train in a second

CASES = {
    "train.py": [
        # flags
        ("--lerning_rate 0.1", "unknown flag --lerning_rate; did you mean --learning_rate?"),
        ("--data_dri {data}", "unknown flag --data_dri; did you mean --data_dir?"),
        ("--epoch 3", "unknown flag --epoch; did you mean --epochs?"),
        ("-b 32", "unknown flag -b"),
        ("--epochs", "--epochs: expected one argument"),
        ("--precision fp8", "--precision: invalid choice: 'fp8'"),
        ("--strict maybe", "--strict"),
        ("--benchmark trian", "--benchmark: invalid choice: 'trian'"),
        ("--steps 1.5", "--steps"),
        (SMALL + "--benchmark train --steps 0", "--steps: must be a whole number of at least 1"),
        (SMALL + "--steps 1", "--steps 1 goes with --benchmark or --lr_find; leave it out"),
        (SMALL + "--classes_by_position true", "--classes_by_position is about the classes of a checkpoint; give one"),
        (SMALL + "--teacher {data}", "teaches nothing with --distillation_weight 0; give it a weight"),
        # values
        ("--epochs 1.5", "--epochs"),
        ("--epochs -1", "--epochs must be at least 0"),
        ("--image_size 0", "image_size must be a whole number from 1 to 16384, got 0"),
        ("--image_size -32", "image_size"),
        ("--learning_rate -0.1", "--learning_rate must be at least 0, got -0.1"),
        ("--learning_rate nan", "--learning_rate must be a number"),
        ("--learning_rate inf", "--learning_rate must be a number"),
        ("--weight_decay -1", "--weight_decay must be at least 0"),
        ("--momentum 1.5", "--momentum must be between 0 and 1"),
        ("--mixup nan", "--mixup must be a number"),
        ("--gradient_clip nan", "--gradient_clip must be a number"),
        ("--lr_step_gamma nan", "--lr_step_gamma must be a number"),
        ("--lr_step_epochs 30 -5", "--lr_step_epochs"),
        ("--adam_betas 0.9 1.5", "--adam_betas"),
        ("--adam_betas 0.9", "--adam_betas"),
        ("--dropout_rate 1", "dropout_rate must be a number in [0, 1)"),
        ("--survival_prob 0", "survival_prob must be a number in (0, 1]"),
        ("--batch_norm_eps 0", "batch_norm_eps must be a number in (0, 1000], got 0"),
        ("--batch_norm_momentum 2", "batch_norm_momentum must be a number in [0, 1]"),
        ("--global_batch_size 0", "--global_batch_size must be at least 1, got 0"),
        ("--per_device_batch_size 0", "--per_device_batch_size must be at least 1, got 0"),
        ("--num_workers -1", "--num_workers must be between 0 and 512, got -1"),
        ("--prefetch_factor 0", "--prefetch_factor must be between 1 and 64"),
        ("--top_k 0", "--top_k must be at least 1"),
        ("--log_every 0", "--log_every must be at least 1"),
        ("--keep_checkpoints 0", "--keep_checkpoints must be at least 1"),
        ("--run_epochs -1", "--run_epochs must be at least 0"),
        ("--crop_scale 0", "--crop_scale must be between"),
        ("--num_labels 0", "--num_labels must be at least 1"),
        ("--variant resnet50", "Unknown variant 'resnet50'"),
        ("--variant widese-b", "Did you mean 'widese-b"),
        # recipes
        ("--config imagenete", "Did you mean 'imagenette'?"),
        ("--config missing.yaml", "cannot read the recipe missing.yaml: No such file or directory"),
        ("--config {folder.yaml}", "Is a directory"),
        ("--config {unknown-key.yaml}", "unknown option 'learning_rat'. Did you mean 'learning_rate'?"),
        ("--config {nested.yaml}", "unknown option 'data'"),
        ("--config {no-yaml.yaml}", "is not valid YAML"),
        ("--config {binary.yaml}", "is not valid YAML"),
        ("--config {a-list.yaml}", "must hold `option: value` lines"),
        ("--config {nan.yaml}", "--learning_rate must be a number"),
        ("--hardware tpu", "--hardware 'tpu' is unknown; known: t4"),
        ("--hardware t4 --precision bf16", "no preset for --precision bf16; it has fp16, fp32"),
        # data
        ("", "no data: give --data_dir DIR"),
        ("--data_dir no/such", "--data_dir no/such does not exist"),
        ("--data_dir {file}", "is a file; name the folder that holds train/ and val/"),
        ("--data_dir {empty-folder}", "no class folders"),
        ("--data_dir {train-alone}", "has none of val/, valid/, validation/, dev/, eval/"),
        ("--data_dir {single-class}", "has a single class folder, a;"),
        ("--data_dir {strange-val-class}", "val has classes that training does not know: x"),
        ("--data_dir {no-class-folders}", "holds 1 image and no class folders"),
        ("--data_dir {empty-class}", "holds no images; fill or remove it"),
        ("--data_dir {same-but-for-case}", "differ only in case, Cat and cat"),
        ("--data_dir {one-folder-too-high}", "give that folder: {one-folder-too-high}/imagenette"),
        ("--data_dir {no-pictures}", "there are no images under"),
        ("--data_dir {data}", "the training data has 12; lower --global_batch_size, e.g. to 8"),
        ("--data_dir {data} --dataset_name a/b", "--data_dir and --dataset_name are two sources"),
        ("--dataset_name no/such", "--dataset_name no/such cannot be loaded"),
        (SMALL + "--num_labels 7", "--num_labels is 7, but the data has 3 classes"),
        (SMALL + "--global_batch_size 6", "--global_batch_size 6 is not a multiple of --per_device_batch_size 4"),
        # places
        (SMALL + "--output_dir {file}", "{file} is a file"),
        (SMALL + "--output_dir {file}/run", "{file} is a file"),
        (SMALL + "--output_dir /proc/run", "annot write /proc/run"),
        (SMALL + "--output_dir {run}", "holds metrics.jsonl, which no run of this version made"),
        (SMALL, "No space left on device", "with a full disk"),
        # checkpoints
        (SMALL + "--resume nowhere", "--resume nowhere: no checkpoint there"),
        (SMALL + "--resume {file}", "is a file; a checkpoint of NVIDIA"),
        (SMALL + "--resume {run-with-damaged-checkpoint}", "no checkpoint is whole"),
        (SMALL + "--output_dir {model} --model {model} --overwrite", "which no run of this version made; move that"),
        (SMALL + "--model no/such/model", "--model no/such/model does not exist"),
        (SMALL + "--model {file}", "is a file; name the folder that holds it"),
        (SMALL + "--model {resnet}", "is a 'resnet' model, not one of ours"),
        (SMALL + "--model {model-without-config}", "holds no config.json"),
        (SMALL + "--model {model-with-broken-config}", "config.json"),
        (SMALL + "--model {model-with-a-list-for-config}", "config.json"),
        (SMALL + "--model {model-with-nonsense-in-config}", "se_ratio must be a number"),
        (SMALL + "--model {model-without-weights}", "it holds no model.safetensors"),
        (SMALL + "--model {model-cut-short}", "cannot be loaded"),
        (SMALL + "--model {model-of-noise}", "cannot be loaded"),
        (SMALL + "--model {model-of-other-shapes}", "cannot be loaded"),
        (SMALL + "--model someone/something", "--model someone/something cannot be opened"),
        # the machine
        (SMALL + "--precision fp16", "--precision fp16 needs a GPU; on a CPU use fp32 or bf16"),
        (SMALL + "--precision tf32", "--precision tf32 needs an NVIDIA GPU"),
        (SMALL + "--sync_batch_norm true", "--sync_batch_norm needs GPUs"),
        (SMALL + "--loader dali-gpu", "--loader dali-gpu decodes on a CUDA GPU and this run has none"),
        (SMALL + "--loader dali-cpu", "pip install --upgrade nvidia-nvimgcodec-cu13", "without DALI"),
        (SMALL + "--compile full", "--compile full needs a C++ compiler", "without a compiler"),
        (SMALL + "--model {model-with-negative-margin} --image_size 4", "with the margin -8 leaves no image"),
        (SMALL + "--report_to clearmel", "is not a tracker that Accelerate knows"),
        (SMALL + "--report_to wandb", "pip install wandb"),
        (SMALL + "--push_to_hub true", "--push_to_hub needs --hub_model_id"),
        (
            "--config {small.yaml} --data_dir {small-val} --global_batch_size 4 --benchmark inference",
            "--per_device_batch_size 4 is more than the 1 validation images; lower it",
        ),
    ],
    "qat.py": [
        ("--data_dir {data}", "quantization starts from a trained model; give --model FOLDER"),
        ("--model {model}", "no data: give --data_dir DIR"),
        ("--config b0 --model {model} --data_dir {data}", "the recipe b0 quantizes nothing; add --placement nvidia"),
        ("--config quant-b9", "Did you mean 'quant-b"),
        ("--callibration_batches 3", "did you mean --calibration_batches?"),
        ("--placement tpu", "--placement: invalid choice: 'tpu'"),
        ("--calibration_method median", "--calibration_method/--calibration-method: invalid choice: 'median'"),
        ("--calibration_percentile 101", "--calibration_percentile must be between"),
        ("--calibration_percentile 0", "--calibration_percentile must be between"),
        ("--calibration_batches 0", "--calibration_batches must be at least 1"),
        ("--sensitivity_batches -1", "--sensitivity_batches must be at least 0"),
        (QAT + "--model no/such/model", "--model no/such/model does not exist"),
        (QAT + "--model {resnet}", "is a 'resnet' model"),
        (QAT + "--model {model-cut-short}", "--model {model-cut-short} cannot be loaded"),
        (QAT + "--model {model} --skip_calibration true", "is not quantized, so it has no ranges to keep"),
        (QAT + "--model {model} --float_layers no.such", "--float_layers no.such: the model has no such layer"),
        (QAT + "--model {model} --sync_batch_norm true", "--sync_batch_norm needs GPUs"),
        (QAT + "--model {model} --precision fp16", "--precision fp16 needs a GPU"),
        (QAT + "--model {model} --resume nowhere", "no checkpoint there"),
        (
            "--config {small-quant.yaml} --data_dir {two-classes} --model {model} --global_batch_size 2"
            " --per_device_batch_size 2",
            "knows other classes than the data",
        ),
        (QAT + "--model {model} --output_dir {run}", "holds metrics.jsonl, which no run of this version made"),
        (QAT + "--model {model}", "pip install nvidia-modelopt", "without modelopt"),
    ],
    "validate.py": [
        ("--modle x", "did you mean --model?"),
        ("--data_dir {data}", "the following arguments are required: --model"),
        ("--model {model}", "no data: give --data_dir"),
        ("--model no/such/model --data_dir {data}", "--model no/such/model does not exist"),
        ("--model someone/something --data_dir {data}", "--model someone/something cannot be opened"),
        ("--model {data} --data_dir {data}", "holds no config.json"),
        ("--model {resnet} --data_dir {data}", "is a 'resnet' model"),
        ("--model {model-cut-short} --data_dir {data}", "--model {model-cut-short} cannot be loaded"),
        ("--model {model-without-weights} --data_dir {data}", "cannot be loaded"),
        ("--model {model-of-other-shapes} --data_dir {data}", "cannot be loaded"),
        ("--model {model-without-processor} --data_dir {data}", "preprocessor_config.json"),
        ("--model {model-with-broken-processor} --data_dir {data}", "preprocessor_config.json"),
        ("--model {model} --data_dir no/such", "--data_dir no/such does not exist"),
        ("--model {model} --data_dir {file}", "is a file"),
        ("--model {model} --data_dir {train-alone}", "validation needs one"),
        ("--model {model} --data_dir {two-classes}", "does not know: a, b; it knows 3, e.g. blue, green, red."),
        ("--model {model} --data_dir {data} --precision fp16", "needs a GPU"),
        ("--model {model} --data_dir {data} --precision tf32", "needs an NVIDIA GPU"),
        ("--model {model} --data_dir {data} --precision int8", "invalid choice: 'int8'"),
        ("--model {model} --data_dir {data} --per_device_batch_size 0", "--per_device_batch_size must be at least 1"),
        ("--model {model} --data_dir {data} --num_workers -1", "--num_workers must be between 0 and 512"),
        ("--model {model} --data_dir {data} --top_k 0", "--top_k must be at least 1"),
        ("--model {model} --data_dir {data} --loader dali-cpu", "--upgrade nvidia-nvimgcodec", "without DALI"),
        ("--model {model} --data_dir {data} --loader dali-gpu", "this run has none"),
        ("--model {model} --data_dir {broken-pictures} --num_workers 0", "--max_bad_files"),
    ],
    "classify.py": [
        ("--model {model}", "the following arguments are required: images"),
        ("{picture.png}", "the following arguments are required: --model"),
        ("--model {model} no/such.png", "no/such.png: no such image"),
        ("--model {model} {data}/val/*/9.jpg", "no such image"),
        ("--model {model} {empty-folder}", "holds no images"),
        ("--model {model} {file}", "not an image"),
        ("--model {model} {picture.png} --top_k 0", "--top_k"),
        ("--model {model} {picture.png} --top_k five", "--top_k"),
        ("--model {model} {picture.png} --batch_size 0", "--batch_size"),
        ("--model {model} {picture.png} --precision fp16", "needs a GPU"),
        ("--model {model} {picture.png} --device cuda", "no CUDA device"),
        ("--model {model} {picture.png} --device cuda:3", "no CUDA device"),
        ("--model {model} {picture.png} --device abacus", "--device abacus"),
        ("--model {model} {picture.png} --tok_k 3", "did you mean --top_k?"),
        ("--model no/such/model {picture.png}", "no/such/model does not exist"),
        ("--model someone/something {picture.png}", "cannot be opened"),
        ("--model {resnet} {picture.png}", "is a 'resnet' model"),
        ("--model {model-cut-short} {picture.png}", "--model {model-cut-short} cannot be loaded"),
        ("--model {model-without-weights} {picture.png}", "cannot be loaded"),
        ("--model {model-of-other-shapes} {picture.png}", "cannot be loaded"),
        ("--model {model-without-processor} {picture.png}", "preprocessor_config.json"),
        ("--model {model} {picture.png} --save_plot {file}/plot.png", "{file} is a file"),
        ("--model {model} {picture.png} --save_plot plot.xyz", "end its name in .png, .pdf, .svg"),
        ("--model {model} {picture.png} --save_plot {empty-folder}", "--save_plot"),
    ],
    "convert.py": [
        ("{model} --output_dir {file}", "{file} is a file; name a folder to write to"),
        ("{model} --output_dir {file}/x", "{file} is a file"),
        ("{model} --output_dir /proc/x", "annot write /proc/x"),
        ("{model} --output_dir {run}", "already exists and is not empty; name another folder, or add --overwrite (in"),
        ("{model} --output_dir y --image_size large", "--image_size"),
        ("{model} --output_dir y --batch_norm_eps nan", "batch_norm_eps"),
        ("{resnet} --output_dir y", "should hold model.safetensors"),
        ("{data} --output_dir y", "should hold model.safetensors"),
        ("lite0 --output_dir y --warm_start b9 --images {data}", "Unknown variant 'b9'"),
        ("lite0 --output_dir y --warm_start b4 --images {data} --num_images 3", "lite0 fits b0 and widese-b0"),
        ("lite0 --output_dir y --warm_start b0 --images no/such", "--images no/such is not a folder"),
        ("lite0 --output_dir y --warm_start b0 --images {data} --num_images 0", "at least one image"),
        ("lite0 --output_dir y --warm_start b0 --images {data} --num_images 30", "24 images, 30 are needed"),
        ("lite0 --output_dir y --warm_start b0 --images {broken-pictures} --num_images 9", "is not an image"),
        ("{model} --output_dir y", "No space left on device", "with a full disk"),
    ],
    "export.py": [
        ("", "the following arguments are required: --model, --output_dir"),
        ("--model {model} --outptu_dir x", "did you mean --output_dir?"),
        ("--model no/such/model --output_dir x", "--model no/such/model does not exist"),
        ("--model someone/something --output_dir x", "cannot be opened"),
        ("--model {resnet} --output_dir x", "is a 'resnet' model"),
        ("--model {model-cut-short} --output_dir x", "--model {model-cut-short} cannot be loaded"),
        ("--model {model-without-weights} --output_dir x", "it holds no model.safetensors"),
        ("--model {model-without-processor} --output_dir x", "holds no preprocessor_config.json"),
        ("--model {model} --output_dir {file}", "{file} is a file; name a folder to write to"),
        ("--model {model} --output_dir {run}", "is not empty; name another folder, or add --overwrite (in Python over"),
        ("--model {model} --output_dir /proc/x", "annot write /proc/x"),
        ("--model {model} --output_dir x --format onxx", "--format onxx: there are onnx, openvino, pt2"),
        ("--model {model} --output_dir x --dtype int4", "--dtype int4: there are fp32, fp16, bf16"),
        ("--model {model} --output_dir x --opset 9", "--opset 9: --exporter torchscript writes 17 to 20"),
        ("--model {model} --output_dir x --opset many", "--opset"),
        ("--model {model} --output_dir x --exporter pen", "--exporter pen: there are"),
        ("--model {model} --output_dir x --dtype bf16 --opset 18", "--dtype bf16 needs --opset 22"),
        ("--model {model} --output_dir x --with_preprocessing --dynamic_image_size", "crops to one size"),
        ("--model {model} --output_dir x --int8 tpu", "--int8 tpu: there are openvino, tensorrt, ort-cpu"),
        ("--model {model} --output_dir x --num_images 1", "at least two"),
        ("--model {model} --output_dir x --data_dir no/such", "--data_dir no/such does not exist"),
        ("--model {model} --output_dir x --data_dir {train-alone}", "validation needs one"),
        ("--model {model} --output_dir x --push_to_hub", "--push_to_hub needs --hub_model_id"),
        ("--model {model} --output_dir x", "No space left on device", "with a full disk"),
    ],
    "benchmark.py": [
        ("train --image_size 0", "--image_size"),
        ("train --variants b9", "b9"),
        ("inference --batch_sizes 0", "--batch_sizes: 0: numbers start at 1"),
        ("ablation --batch_size 0", "--batch_size"),
        ("page no/such", "no/such"),
        ("suite --patience -1", "--patience"),
        ("dta", "unknown command dta; did you mean data?"),
        ("data", "the following arguments are required: --data_dir"),
        ("data --data_dir no/such", "no/such"),
        ("data --data_dir {single-class}/train", "at least two"),
        ("data --data_dir {data}/train --image_size 0", "--image_size: must be a whole number of at least 1"),
        ("data --data_dir {data}/train --batch_size 0", "--batch_size: must be a whole number of at least 1"),
        ("data --data_dir {data}/train --batches 0", "--batches: must be a whole number of at least 1"),
        ("data --data_dir {data}/train --rounds 0", "--rounds: must be a whole number of at least 1"),
        ("data --data_dir {data}/train --batch_size 4096", "lower --batch_size"),
        ("data --data_dir {data}/train --augmentation cutout", "invalid choice: 'cutout'"),
        ("data --data_dir {data}/train --rounds 1 --batches 30 --batch_size 4 --image_size 32", "no plain JPEG"),
        ("data --data_dir {data}/train --output {empty-folder}", "is a folder; name a file"),
    ],
    "effnet_hf.commands.scan": [
        ("", "nothing to scan: name a folder, --labels FILE.csv or --dataset_name"),
        ("no/such", "no/such does not exist"),
        ("{file}", "is a file"),
        ("{empty-folder}", "no class folders"),
        ("{data} --num_workers -1", "--num_workers: must be a whole number of at least 0"),
        ("{data} --num_workers many", "--num_workers"),
        ("{data} --num_worker 2", "did you mean --num_workers?"),
        ("{data} --num_workers 0 --output {file}/bad.txt", "{file} is a file"),
        ("{data} --num_workers 0 --output {empty-folder}", "is a folder; name a file"),
    ],
    "effnet_hf.commands.benchmark": [
        ("train --config quant-b0 --model {model}", "is a recipe that quantizes; only float networks are timed"),
        ("train --stepps 3", "did you mean --steps?"),
    ],
    "effnet_hf.commands.plots": [
        ("", "the following arguments are required: runs"),
        ("no/such", "no/such holds no metrics.jsonl"),
        ("{run-without-metrics}", "holds no metrics.jsonl"),
        ("{run-with-damaged-metrics}", "is damaged"),
        ("{run-with-a-number}", "is damaged"),
        ("{run} --output_dir {file}", "{file}"),
        ("{run} --output_dir {file}/plots", "{file}"),
        ("{run} --outptu_dir x", "did you mean --output_dir?"),
    ],
}
MIDWAY = {  # these show when a run is under way and has a folder of its own
    "train.py": [
        ("--config {small.yaml} --data_dir {broken-pictures}", "more than --max_bad_files 0.01 allows"),
        ("--config {small.yaml} --data_dir {broken-pictures} --strict true", "mend or remove it, or run without"),
        (SMALL + "--learning_rate 1e30 --warmup_epochs 0", "training has diverged; lower --learning_rate"),
        (SMALL, "out of memory (CUDA out of memory. Tried to allocate 20.00 MiB); lower", "with little memory"),
    ],
}


def rows(cases: dict) -> list:
    return [
        pytest.param(program, *case, *[None] * (3 - len(case)), id=" ".join([program, case[0], *case[2:]]))
        for program, table in cases.items()
        for case in table
    ]


def fill(text: str, places: dict[str, str]) -> str:
    return re.sub(r"{(.+?)}", lambda match: places[match[1]], text)


@pytest.mark.parametrize("program, line, words, world", rows(CASES))
def test_one_clear_line_and_exit_code_2(program, line, words, world, places, worlds, typed, tmp_path):
    before = snapshot(places["root"], tmp_path)
    refused(program, line, words, world, places, worlds, typed)
    assert snapshot(places["root"], tmp_path) == before


@pytest.mark.parametrize("program, line, words, world", rows(MIDWAY))
def test_the_same_while_running(program, line, words, world, places, worlds, typed):
    before = snapshot(places["root"])
    refused(program, f"{line} --output_dir run", words, world, places, worlds, typed)
    assert snapshot(places["root"]) == before


def refused(program, line, words, world, places, worlds, typed):
    if world is not None:
        worlds[world]()
    code, _, error = typed(program, [fill(word, places) for word in line.split()])
    assert code == 2
    assert error.count("\n") == 1 and error.endswith("\n"), error
    name = program if program.endswith(".py") else f"effnet-hf {program.rpartition('.')[2]}"
    assert error.startswith((f"{name}: error: ", f"{name} {line.split()[0]}: error: ") if line else f"{name}: "), error
    assert fill(words, places) in error
    assert "Traceback" not in error and len(error) < 600, error


def test_the_sweep_is_wide():
    ids = [row.id for row in rows(CASES)]
    assert len(ids) >= 150 and len(set(ids)) == len(ids)
