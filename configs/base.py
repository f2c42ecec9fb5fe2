"""Every configuration key, its default and its meaning. A run's config starts from `get_config()` and assigns what differs.

Defaults are the paper's published settings (marked "paper") or, where it leaves a point open, our choice. Fields are
locked: a misspelt key on the command line fails.
"""

from ml_collections import ConfigDict, config_dict

from arrol_jax.config import Section


def get_config() -> ConfigDict:
  c = Section()
  c.steps = 200                # training steps; each is epochs x minibatches optimizer steps
  c.stop_seconds = config_dict.placeholder(float)  # a run ends with the step that fills so many seconds of steps, compilation
                               # and evaluations not counted (sec_total in metrics.jsonl), or after `steps`; None: after `steps`
  c.seed = 0

  c.model = Section()
  c.model.path = ""            # Hugging Face folder, .gguf file, or an id on the hub: Qwen/Qwen3-0.6B
  c.model.dtype = "bfloat16"   # activations, decoding weights and cache; parameters and optimizer are float32
  c.model.attention = "auto"   # training: "xla", "cudnn" (NVIDIA), "splash" (TPU) or "auto"
  c.model.remat = "dots"       # the backward pass recomputes "none", "dots" (all but matrix products) or "full" (least memory)
  c.model.scan_layers = True   # the update scans over the layers; False: one by one, a sixth faster on an H100, with more memory
                               # and a longer compilation

  c.model.lora = Section()  # adapters beside a frozen base, which is held in model.dtype
  c.model.lora.rank = 0        # of each; 0: none, all weights are trained
  c.model.lora.alpha = 32.0    # their product counts alpha / rank times
  c.model.lora.targets = ("q", "k", "v", "o", "gate", "up", "down")  # the matrices that have them

  c.data = Section()
  c.data.train = ""            # JSONL (optionally .gz), a benchmark's name, tfds:, hf:, reasoning_gym: (arrol_jax/data/sources.py
                               # says all); several, separated by commas
  c.data.eval = ""             # held-out problems, same forms; "" = no evaluation
  c.data.folder = ""           # where benchmarks' files are looked up by name
  c.data.tfds_dir = config_dict.placeholder(str)  # where tfds: keeps its copies; None: TFDS's own place
  c.data.template = "{problem}"  # prompt text; configs/templates.py has the usual ones
  c.data.chat = False          # wrap the prompt in the tokenizer's chat template: for instruct models
  c.data.system = config_dict.placeholder(str)  # the chat's system message; None: the chat template's own
  c.data.thinking = False      # what that template hears as enable_thinking (Qwen3)

  c.rollout = Section()
  c.rollout.prompts = 32       # prompts a step (open in the paper)
  c.rollout.candidates = config_dict.placeholder(int)  # prompts looked at a step, of which `prompts` are rolled out: those
                               # whose own states promise most signal (METHOD 10.2); None: no choice. prune.detect=(0, ...) asks
                               # for twice as many
  c.rollout.explore = 0.1      # share of the chosen that is drawn at random among the rest, in expectation
  c.rollout.candidate_layer = "2/3"  # share of the depth whose state of a prompt is read
  c.rollout.group_size = 16    # G, rollouts a prompt (paper)
  c.rollout.temperature = 1.0  # (open in the paper)
  c.rollout.top_k = config_dict.placeholder(int)    # sampling filters; None: off (open in the paper). Log-probs stay unfiltered
  c.rollout.top_p = config_dict.placeholder(float)
  c.rollout.min_p = config_dict.placeholder(float)
  c.rollout.max_prompt = 512   # longer prompts are skipped, with a count
  c.rollout.max_new = 2048     # response tokens at most (open in the paper)
  c.rollout.slots = config_dict.placeholder(int)  # rows that decode at once; None: as many as free memory holds
  c.rollout.cache = config_dict.placeholder(str)  # "int8" halves the key-value cache; None: model.dtype
  c.rollout.weights = config_dict.placeholder(str)  # "int8" halves the weights that are read to decode (a scale an output
                               # channel; evaluation and serving too); None: model.dtype. See logprob_gap, loss.correction
  c.rollout.attention = "auto"  # over the cache: "xla", "triton" (NVIDIA), "tpu" or "auto"
  c.rollout.resampling = 1         # above 1: DAPO's dynamic sampling in at most so many rounds, later ones as large as needed
  c.rollout.ahead = 0          # slots that a step's last rollouts leave free begin so many of the next steps: see loss.correction
  c.rollout.segment = 32       # decode steps between two looks of the host; divides prune.detect
  c.rollout.row_buckets = 4    # compiled row counts: slots, slots/2, slots/4, ...
  c.rollout.length_buckets = 4  # compiled cache lengths, evenly spaced (one where attention reads each row's own length)

  c.prune = Section()
  c.prune.enabled = True
  c.prune.detect = (512,)      # response tokens at each decision (paper: one, at 512), ascending; a table each
  c.prune.keep = 0.5           # kappa, target keep ratio (paper); that of all decisions together
  c.prune.target = 0.5         # rho, target positive ratio (paper)
  c.prune.strength = 0.5       # lambda (paper)
  c.prune.p_min = 0.1          # (paper)
  c.prune.p_max = 0.9          # (paper)
  c.prune.cold_start = 20      # first steps without pruning, while head and table gather data (paper)
  c.prune.bins = 128           # B (paper)
  c.prune.rule = "published"   # "group": balance within it (METHOD 9.5); "budget": most signal over the batch (METHOD
                               # 10.1); MODULE.FUNCTION: your own; baselines: "random", "lowest", "highest" posterior,
                               # "confidence" (DeepConf's, in its group), "max_variance" (PODS: all finish, a share is trained on)
  c.prune.draw = "bernoulli"   # (paper); "systematic": a fixed number of survivors a group, same probabilities
  c.prune.floor = 0            # survivors of a group that decides together, at least
  c.prune.holdout = 0.0        # share of rollouts that are never pruned: unbiased false-prune rate
  c.prune.weigh = ()           # where survivors count 1 / keep probability times (METHOD 9.1): any of "table", "head", "policy"
  c.prune.half_life = config_dict.placeholder(float)  # rollouts started until a count weighs half; None: never (open)

  c.quality = Section()
  c.quality.inputs = ("last",)  # hidden state at the token (paper); further "mean" so far, "logprobs" (METHOD 9.6)
  c.quality.fit = "adam"       # with the policy's step (paper); "ridge": in closed form, at each decision and the last token
                               # (METHOD 10.3). It also reads "mean@2/3", "last@3/4", "prompt@2/3", "windows", "siblings"
  c.quality.strength = 8.0     # of the ridge's prior: rollouts a feature
  c.quality.center = True      # the ridge ranks by a fit within prompts, and takes a prompt's level from another
  c.quality.half_life = config_dict.placeholder(float)  # rollouts started until the ridge's examples weigh half, and those of the
                               # choice of prompts; None: never
  c.quality.balance = False    # right and wrong rollouts weigh alike in the head's loss; their shares are the table's to know
  c.quality.hidden = 256       # units of the head's hidden layer (open in the paper)
  c.quality.buffer = config_dict.placeholder(int)  # scored rollouts kept for more passes of the head alone; None: no passes
  c.quality.passes = 8         # full-batch steps over the buffer after each training step
  c.quality.weight_decay = 0.0  # in those steps
  c.quality.short = "skip"     # rollouts that end before detection: "skip" or "last" hidden state (open in the paper)

  c.learn = Section()
  c.learn.keep = 1.0           # share of a group's survivors that is learned from: those whose rewards vary most (PODS)

  c.loss = Section()
  c.loss.name = "grpo"         # "grpo", "dapo", "dr_grpo", "gspo"; the fields below override what it prescribes (None: nothing)
  c.loss.clip_low = config_dict.placeholder(float)
  c.loss.clip_high = config_dict.placeholder(float)
  c.loss.aggregate = config_dict.placeholder(str)        # "token", "sequence" or "constant"
  c.loss.ratio = config_dict.placeholder(str)            # "token" or "sequence"
  c.loss.overlong = config_dict.placeholder(float)       # share of max_new over which long responses are punished
  c.loss.kl_weight = config_dict.placeholder(float)
  c.loss.normalize_std = config_dict.placeholder(bool)
  c.loss.head_weight = config_dict.placeholder(float)
  c.loss.baseline = "survivors"  # advantages are measured from their mean; "started": from that of all rollouts started, where
                               # a pruned one counts as its posterior says (METHOD 10.7)
  c.loss.correction = "none"   # what sampler and trainer differ by: "truncate" weighs each token by min(ratio, cap), "mask"
  c.loss.correction_cap = 2.0  # each row by its whole ratio, not at all above the cap; for "int8" of rollout

  c.optim = Section()
  c.optim.lr = 1e-6            # policy (paper)
  c.optim.head_lr = 1e-3       # quality head (open in the paper)
  c.optim.warmup = 0           # steps
  c.optim.schedule = "constant"  # after the warm-up; "linear" and "cosine" go down, to 0 when the last step is done,
                               # or at stop_seconds by seconds
  c.optim.epochs = 1           # passes over a step's batch,
  c.optim.minibatches = 1      # each in so many optimizer steps of whole groups; 1 and 1: one step, whose ratio is 1
  c.optim.clip_norm = 1.0
  c.optim.weight_decay = 0.0
  c.optim.b1 = 0.9
  c.optim.b2 = 0.99
  c.optim.micro_tokens = 16384  # tokens (padding included) a micro-batch
  c.optim.chunk_tokens = 4096  # tokens whose logits exist at once, on each chip
  c.optim.length_buckets = 2   # compiled lengths of attention's rows in the update
  c.optim.tail_sizes = 2       # compiled sizes of the last micro-batch that are smaller, evenly: a third and two thirds

  c.reward = Section()
  c.reward.pattern = "boxed"   # where the answer is: the last \boxed{}; "answer": after "Answer:"; "hashes", "first_hashes":
                               # after "####"; or a regular expression with one group, whose last match counts
  c.reward.function = config_dict.placeholder(str)  # "package.module.function" of (response, answer) -> any finite number; None:
                               # math equality, 1 or 0. arrol_jax.rewards.gym.score for reasoning_gym:
  c.reward.success = 1.0       # least reward of a success: what head, tables, votes and accuracy take for right (advantages take
                               # the reward as it is)
  c.reward.workers = 2         # processes: for a function, and for answers that are not numbers
  c.reward.timeout = 5.0       # seconds an answer may take there
  c.reward.memory = 2048       # MiB a process may add

  c.checkpoint = Section()
  c.checkpoint.every = 20      # steps
  c.checkpoint.keep = 2        # newest kept, and beside them the one whose steps had the highest reward_ipw
  c.checkpoint.best = config_dict.placeholder(str)  # "held_out_accuracy": after each eval.every steps a checkpoint too, of which
                               # the best is kept, evaluated at the end and exported; None: the last step is
  c.checkpoint.last = True     # also after the last step; False: a run that has ended cannot be made longer
  c.checkpoint.export = True   # at the end, write policy/: Hugging Face layout in model.dtype, head and table beside it; with
                               # adapters, policy/ has them merged and adapter/ holds them alone, as PEFT reads them

  c.eval = Section()
  c.eval.benchmarks = ""       # more sources for `evaluate`, separated by commas
  c.eval.problems = 0          # first so many problems; 0: all
  c.eval.every = config_dict.placeholder(int)  # steps after which a part of data.eval is evaluated during training; None: only
                               # all of it, before and after
  c.eval.before = True         # all of data.eval before the first step too
  c.eval.at_seconds = ()       # seconds of steps, as stop_seconds counts them, after which all of data.eval is evaluated
  c.eval.sampled = 0           # where all of it is evaluated: so many more responses a problem, at rollout.temperature; 0: none
  c.eval.subset = 256          # problems of each source then, evenly spaced
  c.eval.samples = 1           # responses a problem
  c.eval.temperature = 0.0     # 0: greedy
  c.eval.max_new = 0           # 0: as rollout.max_new
  c.eval.deepconf = False      # with several samples: also vote by DeepConf's trace confidences, over groups of `window` tokens
  c.eval.window = 2048         # (DeepConf)
  c.eval.stop_below = config_dict.placeholder(float)  # ends traces of lower posterior at prune.detect; a problem's best goes on

  c.log = Section()
  c.log.rollouts = 4           # texts a step written to rollouts.jsonl
  c.log.backends = "jsonl,tensorboard"  # where figures go: "tensorboard", "wandb", "trackio", beside metrics.jsonl ("jsonl"),
                               # which is always written

  c.mesh = Section()
  c.mesh.data = 1
  c.mesh.fsdp = 1
  c.mesh.tensor = 1
  return c.lock()  # a misspelt key in a config file fails too
