//! Dividing the memory: how many KV blocks, and so how long a context, fit beside the weights.
//!
//! Derived once, before anything is loaded, printed, and never exceeded. The budget is what the
//! operator said, or what is free at the start; a model's bounds are the same every time it is
//! loaded.

use std::fs;
use std::path::Path;
use std::process::Command;

use hearth_models::{Compute, EncoderConfig, KvDType, KvGeometry, ModelConfig};

use crate::config::PlanOptions;
use crate::engine::handle::{Limits, PROPOSED_ROWS, SCORE_CHUNK};

/// Tokens of a KV block.
pub const BLOCK_LEN: usize = 16;
/// Part of what is left beside the weights that KV may take; the rest is for activations, the
/// server, and whatever else the machine does.
const KV_SHARE: f64 = 0.75;
/// Left alone in any case.
const RESERVE_BYTES: u64 = 256 << 20;
/// A context with which models are worth having beside each other, in tokens; where it would be
/// shorter, they take turns.
const CONTEXT_WANTED: usize = 4096;
/// For KV of all models, where the system does not say how much memory there is.
const KV_BYTES_UNKNOWN: u64 = 2 << 30;

/// Why there is no plan.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum PlanError {
    /// Longer than the model was made for.
    #[error("--ctx-size {asked} is more than the {max} tokens this model was made for")]
    BeyondModel {
        /// Asked for.
        asked: usize,
        /// What the model can do.
        max: usize,
    },
    /// More memory than there is.
    #[error(
        "{needed_mb} MB for its weights and a context of {context_len} tokens are more than the \
         memory budget of {available_mb} MB; ask for a smaller --ctx-size or a larger \
         --memory-budget"
    )]
    NoMemory {
        /// Tokens.
        context_len: usize,
        /// MB that all of it takes.
        needed_mb: u64,
        /// MB that there are.
        available_mb: u64,
    },
}

/// A model as the plan sees it.
#[derive(Clone, Copy, Debug)]
pub struct Demand<'a> {
    /// Its numbers.
    pub config: &'a ModelConfig,
    /// Ids of its tokenizer.
    pub vocab_len: usize,
    /// What its weights will take, as they will be stored.
    pub weight_bytes: u64,
    /// The numbers of the model that guesses for it, and what the weights of that one will take.
    pub draft: Option<(&'a ModelConfig, u64)>,
    /// Ranks among which both are divided, and how many of those share a memory. Bytes here are
    /// those of one memory.
    pub ranks: (usize, usize),
}

/// Bounds of each of the models that share `budget` bytes with `others` bytes of other things.
///
/// Where all fit beside each other with a context worth having, they share evenly what the weights
/// leave. Where not, they take turns: each has half of the budget, so that two of a size fit beside
/// each other, or if that is too little for a context, the whole.
pub fn plan(
    models: &[Demand<'_>],
    options: &PlanOptions,
    budget: Option<u64>,
    others: u64,
) -> Vec<Result<Limits, PlanError>> {
    let Some(budget) = budget else {
        let kv = KV_BYTES_UNKNOWN / models.len().max(1) as u64;
        return models.iter().map(|model| limits(model, options, kv, kv)).collect();
    };
    let kv = |budget: u64, taken: u64| (budget.saturating_sub(taken) as f64 * KV_SHARE) as u64;
    let worth = |limits: &Limits, model: &Demand<'_>| {
        let wanted = options.ctx_size.unwrap_or(model.config.context_len.min(CONTEXT_WANTED));
        limits.context_len >= wanted
    };
    let taken = models.iter().map(|model| own_bytes(model, options)).sum::<u64>() + others;
    let each = kv(budget, taken) / models.len().max(1) as u64;
    let beside = |model| limits(model, options, each, budget).ok().filter(|l| worth(l, model));
    if let Some(all) = models.iter().map(beside).collect::<Option<Vec<_>>>() {
        return all.into_iter().map(Ok).collect();
    }
    let turn = |model: &Demand<'_>| {
        let own = own_bytes(model, options);
        let half = limits(model, options, kv(budget / 2, own), budget).ok();
        let half = half.filter(|limits| worth(limits, model));
        half.map_or_else(|| limits(model, options, kv(budget, own), budget), Ok)
    };
    models.iter().map(turn).collect()
}

/// What a model takes at most once it is in memory: weights, working memory, keys and values.
pub fn bytes(model: &Demand<'_>, options: &PlanOptions, limits: &Limits) -> u64 {
    own_bytes(model, options) + kv_bytes(model, options, limits.kv_blocks)
}

/// Bounds of the model with these numbers that guesses for one with these bounds.
pub fn draft_limits(config: &ModelConfig, limits: &Limits) -> Limits {
    Limits { context_len: limits.context_len.min(config.context_len), ..limits.clone() }
}

/// The same of an encoder, with passes of so many rows.
pub fn encoder_bytes(config: &EncoderConfig, weight_bytes: u64, batch_tokens: usize) -> u64 {
    weight_bytes + 4 * (batch_tokens * (8 * config.hidden_len + 2 * config.ffn_len)) as u64
}

/// What models may take together where the operator does not say: what is free where they compute,
/// less a reserve.
pub fn budget(compute: &Compute) -> Option<u64> {
    let free = compute.free_bytes().or_else(free_bytes);
    free.map(|free| free.saturating_sub(RESERVE_BYTES))
}

/// Bounds of one model that may take `kv_bytes` for KV, of a budget that an error names.
fn limits(
    model: &Demand<'_>,
    options: &PlanOptions,
    kv_bytes: u64,
    budget: u64,
) -> Result<Limits, PlanError> {
    let config = model.config;
    let max = config.context_len;
    if let Some(asked) = options.ctx_size.filter(|&asked| asked > max) {
        return Err(PlanError::BeyondModel { asked, max });
    }
    let affordable = affordable_blocks(model, options, kv_bytes);
    let fits = affordable.saturating_mul(BLOCK_LEN);
    let context_len = options.ctx_size.unwrap_or(max.min(fits));
    if context_len == 0 || context_len > fits {
        let context_len = context_len.max(BLOCK_LEN);
        let kv = self::kv_bytes(model, options, context_len.div_ceil(BLOCK_LEN));
        let needed = own_bytes(model, options) + (kv as f64 / KV_SHARE).ceil() as u64;
        let (needed_mb, available_mb) = (needed.div_ceil(1 << 20), budget >> 20);
        return Err(PlanError::NoMemory { context_len, needed_mb, available_mb });
    }
    let useful = options.running_len * context_len.div_ceil(BLOCK_LEN);
    Ok(Limits {
        context_len,
        vocab_len: model.vocab_len.min(config.vocab_len),
        queue_len: options.queue_len,
        running_len: options.running_len,
        batch_tokens: options.batch_tokens.max(options.running_len),
        kv_blocks: affordable.min(useful).min(u32::MAX as usize / BLOCK_LEN),
        block_len: BLOCK_LEN,
        target_itl: options.target_itl,
        queue_timeout: options.queue_timeout,
        kv_prefault: options.kv_prefault,
    })
}

/// What a model takes besides keys and values.
fn own_bytes(model: &Demand<'_>, options: &PlanOptions) -> u64 {
    let working = |config| working_bytes(config, options) * model.ranks.1 as u64;
    let draft = model.draft.map_or(0, |(config, weights)| weights + working(config));
    model.weight_bytes + working(model.config) + draft
}

/// A block of a model, and of the one that guesses for it.
fn both_block_bytes(model: &Demand<'_>, options: &PlanOptions) -> u64 {
    let (ranks, together) = model.ranks;
    let share = |bytes: u64| (bytes * together as u64).div_ceil(ranks as u64);
    let block = |config| share(block_bytes(config, options.kv_dtype));
    block(model.config) + model.draft.map_or(0, |(config, _)| block(config))
}

/// What lies before the layers of so many blocks, in the first huge page of each.
fn lead_bytes(model: &Demand<'_>, options: &PlanOptions, blocks: usize) -> u64 {
    let (ranks, together) = model.ranks;
    let of = |config: &ModelConfig| {
        let whole = config.kv_geometry(blocks, BLOCK_LEN, options.kv_dtype);
        let rank = KvGeometry { kv_head_count: whole.kv_head_count.div_ceil(ranks), ..whole };
        ((rank.resident_bytes() - rank.bytes()) * together) as u64
    };
    of(model.config) + model.draft.map_or(0, |(config, _)| of(config))
}

/// What so many blocks take.
fn kv_bytes(model: &Demand<'_>, options: &PlanOptions, blocks: usize) -> u64 {
    let own = blocks as u64 * both_block_bytes(model, options);
    own + lead_bytes(model, options, blocks)
}

/// How many take no more than that.
fn affordable_blocks(model: &Demand<'_>, options: &PlanOptions, bytes: u64) -> usize {
    let block_bytes = both_block_bytes(model, options);
    let fit = |bytes: u64| usize::try_from(bytes / block_bytes).unwrap_or(usize::MAX);
    // Before fewer blocks lies no more than before many.
    fit(bytes.saturating_sub(lead_bytes(model, options, fit(bytes))))
}

/// Activations of one forward pass and the logits that it may yield, twice over; of one rank no
/// more than that.
fn working_bytes(config: &ModelConfig, options: &PlanOptions) -> u64 {
    let mlp = match config.experts {
        None => 2 * config.ffn_len,
        // What is gathered for each, as floats and as bytes, and what comes back.
        Some(routing) => 3 * routing.used * (config.hidden_len + config.ffn_len),
    };
    let widths = 4 * config.hidden_len + mlp + 2 * config.q_len() + 4 * config.kv_len();
    let rows = options.batch_tokens.max(options.running_len) * widths;
    let logits = 2 * (options.running_len + SCORE_CHUNK + PROPOSED_ROWS) * config.vocab_len;
    4 * (rows + logits) as u64
}

/// Bytes of one block over all layers, K and V.
pub fn block_bytes(config: &ModelConfig, dtype: KvDType) -> u64 {
    config.kv_geometry(1, BLOCK_LEN, dtype).bytes() as u64
}

/// Memory that this process may still take: the machine's, or less where a control group says so.
/// `None` where the system does not tell.
pub fn free_bytes() -> Option<u64> {
    let machine = meminfo("MemAvailable:").or_else(half_of_physical);
    machine.map(|free| free.min(cgroup_free().unwrap_or(u64::MAX)))
}

/// macOS says how much memory there is, not how much of it can be had.
fn half_of_physical() -> Option<u64> {
    let told = Command::new("sysctl").args(["-n", "hw.memsize"]).output().ok()?;
    Some(String::from_utf8(told.stdout).ok()?.trim().parse::<u64>().ok()? / 2)
}

fn meminfo(key: &str) -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find(|line| line.starts_with(key))?;
    Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? << 10)
}

/// Limit less use, the least of all groups around this process; page cache counts as free.
fn cgroup_free() -> Option<u64> {
    let number = |path: &Path| fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
    let mut free = None;
    for line in groups.lines() {
        let mut parts = line.splitn(3, ':');
        let (_, controllers, group) = (parts.next()?, parts.next()?, parts.next()?);
        let (root, limit, usage, cache) = match controllers {
            "" => ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file "),
            c if c.split(',').any(|c| c == "memory") => (
                "/sys/fs/cgroup/memory",
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                "total_inactive_file ",
            ),
            _ => continue,
        };
        for group in Path::new(group).ancestors() {
            let folder = Path::new(root).join(group.strip_prefix("/").unwrap_or(group));
            let Some(limit) = number(&folder.join(limit)) else { continue };
            let used = number(&folder.join(usage)).unwrap_or(0);
            let stat = fs::read_to_string(folder.join("memory.stat")).unwrap_or_default();
            let cached = stat.lines().find_map(|l| l.strip_prefix(cache)?.parse::<u64>().ok());
            let left = limit.saturating_sub(used.saturating_sub(cached.unwrap_or(0)));
            free = Some(free.map_or(left, |f: u64| f.min(left)));
        }
    }
    free
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use hearth_models::backend::Routing;

    use super::*;

    fn options() -> PlanOptions {
        PlanOptions {
            ctx_size: None,
            running_len: 4,
            queue_len: 8,
            batch_tokens: 2,
            target_itl: Duration::from_millis(100),
            queue_timeout: None,
            kv_dtype: KvDType::F16,
            kv_prefault: false,
        }
    }

    fn demand(config: &ModelConfig, weight_bytes: u64) -> Demand<'_> {
        Demand { config, vocab_len: 512, weight_bytes, draft: None, ranks: (1, 1) }
    }

    fn alone(options: PlanOptions, vocab_len: usize, kv_budget: u64) -> Result<Limits, PlanError> {
        let config = hearth_models::tiny::config();
        let model = Demand { vocab_len, ..demand(&config, 0) };
        limits(&model, &options, kv_budget, kv_budget)
    }

    #[test]
    fn plenty_of_memory_gives_every_sequence_the_whole_context() {
        let limits = alone(options(), 500, 1 << 30).unwrap();
        assert_eq!((limits.context_len, limits.kv_blocks), (1024, 4 * 64));
        assert_eq!(limits.vocab_len, 500, "padding of the embedding is no token");
        assert_eq!(limits.batch_tokens, 4, "a row for every running sequence");
    }

    #[test]
    fn little_memory_shortens_the_context_and_none_is_an_error() {
        // 2 layers * 16 tokens * 64 * 2 (K and V) * 2 bytes
        assert_eq!(block_bytes(&hearth_models::tiny::config(), KvDType::F16), 8192);
        // 2 layers * 16 tokens * 2 heads * 2 (K and V) * (32 bytes and a scale)
        let bytes = block_bytes(&hearth_models::tiny::config(), KvDType::Q8_0);
        assert_eq!(bytes, 2 * 16 * 2 * 2 * (32 + 4), "bytes and their scales");
        let bytes = block_bytes(&hearth_models::tiny::config(), KvDType::Q16_0);
        assert_eq!(bytes, 2 * 16 * 2 * 2 * (64 + 4), "integers and their scales");
        assert_eq!(block_bytes(&hearth_models::tiny::config(), KvDType::Fp8), 4096);
        let limits = alone(options(), 512, 10 * 8192 + 5).unwrap();
        assert_eq!((limits.context_len, limits.kv_blocks), (160, 10));
        let asked = PlanOptions { ctx_size: Some(161), ..options() };
        let error = alone(asked, 512, 10 * 8192).unwrap_err();
        assert!(matches!(error, PlanError::NoMemory { context_len: 161, .. }));
        assert!(alone(options(), 512, 0).is_err());
    }

    #[test]
    fn more_than_the_model_was_made_for_is_refused() {
        let asked = PlanOptions { ctx_size: Some(2000), ..options() };
        let error = alone(asked, 512, 8 << 30).unwrap_err();
        assert_eq!(error, PlanError::BeyondModel { asked: 2000, max: 1024 });
    }

    /// What is gathered for the experts of every row, and what they bring, is in the plan.
    #[test]
    fn experts_take_memory_of_every_row() {
        let dense = hearth_models::tiny::config();
        let routing = |used| Some(Routing { count: 64, used, normalized: true });
        let of = |used| {
            working_bytes(&ModelConfig { experts: routing(used), ..dense.clone() }, &options())
        };
        let rows = options().batch_tokens.max(options().running_len);
        let alive = 2 * dense.hidden_len + 2 * dense.ffn_len;
        assert!(of(8) - of(1) >= (4 * 7 * rows * alive) as u64);
        assert!(of(1) > working_bytes(&dense, &options()));
    }

    #[test]
    fn weights_of_all_models_come_before_keys_and_values_of_any() {
        let config = hearth_models::tiny::config();
        let demand = |weight_bytes| demand(&config, weight_bytes);
        let budget = (4 << 30) + 2 * working_bytes(&config, &options()) + 30_000_000;
        for models in [[demand(3 << 30), demand(1 << 30)], [demand(1 << 30), demand(3 << 30)]] {
            let all = plan(&models, &options(), Some(budget), 0);
            let all: Vec<Limits> = all.into_iter().map(Result::unwrap).collect();
            assert!(all.iter().all(|l| l.kv_blocks == 256 && l.context_len == 1024));
            let bytes = |(model, limits)| bytes(model, &options(), limits);
            assert!(models.iter().zip(&all).map(bytes).sum::<u64>() <= budget);
        }
        assert!(plan(&[demand(1 << 40)], &options(), None, 0)[0].is_ok(), "nothing is known");
    }

    #[test]
    fn what_does_not_fit_together_takes_turns() {
        let config = hearth_models::tiny::config();
        let demand = |weight_bytes| demand(&config, weight_bytes);
        let models = [demand(1 << 30), demand(3 << 30), demand(5 << 30)];
        let budget = 4 << 30;
        let all = plan(&models, &options(), Some(budget), 0);
        for (model, limits) in models.iter().zip(&all).take(2) {
            let limits = limits.as_ref().unwrap();
            assert_eq!(limits.context_len, 1024);
            assert!(bytes(model, &options(), limits) <= budget);
        }
        let error = all[2].clone().unwrap_err();
        let PlanError::NoMemory { needed_mb, available_mb, .. } = error else { panic!("{error}") };
        assert_eq!(available_mb, 4096);
        assert!(needed_mb >= 5120, "{needed_mb}");
        // A thing beside them takes its part.
        let two = [demand(1 << 30), demand(1 << 30)];
        let beside = |others| plan(&two, &options(), Some(budget), others)[0].clone().unwrap();
        assert_eq!(beside(0), beside(3 << 30), "each alone has as much");
    }

    #[test]
    fn who_guesses_has_its_part_of_the_memory() {
        let large = hearth_models::tiny::config();
        let small = ModelConfig { context_len: 512, layer_count: 1, ..large.clone() };
        let alone = demand(&large, 1000);
        let helped = Demand { draft: Some((&small, 500)), ..alone };
        let own = own_bytes(&helped, &options());
        assert_eq!(own, own_bytes(&alone, &options()) + 500 + working_bytes(&small, &options()));
        // A block of the small one is half as large.
        let kv = 100 * (8192 + 4096);
        let limits = limits(&helped, &options(), kv, kv).unwrap();
        assert_eq!(limits.kv_blocks, 100);
        assert_eq!(bytes(&helped, &options(), &limits), own + kv);
        let draft = draft_limits(&small, &limits);
        assert_eq!((limits.context_len, draft.context_len, draft.kv_blocks), (1024, 512, 100));
    }

    #[test]
    fn ranks_divide_keys_and_values_where_their_memories_are_apart() {
        let config = hearth_models::tiny::config();
        let of = |ranks| {
            let model = Demand { ranks, ..demand(&config, 1000) };
            let limits = limits(&model, &options(), 8 * 8192, u64::MAX).unwrap();
            (limits.kv_blocks, bytes(&model, &options(), &limits))
        };
        let working = working_bytes(&config, &options());
        assert_eq!(of((1, 1)), (8, 1000 + working + 8 * 8192));
        assert_eq!(of((2, 1)), (16, 1000 + working + 8 * 8192), "on each of two devices");
        assert_eq!(of((2, 2)), (8, 1000 + 2 * working + 8 * 8192), "two in one memory");
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn what_lies_before_each_layer_in_its_first_huge_page_is_counted() {
        const BLOCKS: u64 = 1024;
        let config = hearth_models::tiny::config();
        let many = PlanOptions { running_len: 16, ..options() };
        let of = |ranks, kv: u64| {
            let model = Demand { ranks, ..demand(&config, 0) };
            let limits = limits(&model, &many, kv, u64::MAX).unwrap();
            let kv_bytes = bytes(&model, &many, &limits) - own_bytes(&model, &many);
            (limits.kv_blocks as u64, kv_bytes)
        };
        // The second of two layers of 4 MiB begins in the middle of a page of 2 MiB.
        let (enough, lead) = (BLOCKS * 8192, 1 << 20);
        assert_eq!(of((1, 1), 1 << 40), (BLOCKS, enough + lead));
        assert_eq!(of((1, 1), enough), (BLOCKS - lead / 8192, enough), "no more than there is");
        assert_eq!(of((2, 2), 1 << 40), (BLOCKS, enough + 2 * lead), "each of two ranks has one");
        // Layers of less than a page begin at its beginning.
        assert_eq!(of((2, 2), 500 * 8192), (500, 500 * 8192));
        let needed = limits(&demand(&config, 0), &many, 0, 0).unwrap_err();
        assert!(matches!(needed, PlanError::NoMemory { context_len: 16, .. }));
    }

    #[test]
    fn this_machine_has_memory() {
        assert!(free_bytes().is_none_or(|free| free > 1 << 20));
    }
}
