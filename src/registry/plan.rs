//! Dividing the memory: how many KV blocks, and so how long a context, fit beside the weights.
//!
//! Derived once, before anything is loaded, printed, and never exceeded.

use std::fs;
use std::path::Path;
use std::process::Command;

use hearth_models::{KvDType, ModelConfig};

use crate::config::PlanOptions;
use crate::engine::handle::{Limits, SCORE_CHUNK};

/// Tokens of a KV block.
pub const BLOCK_LEN: usize = 16;
/// Part of what is left beside the weights that KV may take; the rest is for activations, the
/// server, and whatever else the machine does.
const KV_SHARE: f64 = 0.75;
/// Left alone in any case.
const RESERVE_BYTES: u64 = 256 << 20;
/// For KV of all models, where the system does not say how much memory there is.
const KV_BYTES_UNKNOWN: u64 = 2 << 30;

/// Why there is no plan.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
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
        "a context of {context_len} tokens needs {needed_mb} MB for keys and values, and \
         {available_mb} MB are free beside the weights; ask for a smaller --ctx-size"
    )]
    NoMemory {
        /// Tokens.
        context_len: usize,
        /// MB that they take.
        needed_mb: u64,
        /// MB that are there.
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
}

/// Bounds of every model on a machine with `free_bytes`, none of them loaded yet. Weights and
/// working memory of all come first; what is left is divided evenly among them for KV.
pub fn plan(
    models: &[Demand<'_>],
    options: &PlanOptions,
    free_bytes: Option<u64>,
) -> Result<Vec<Limits>, PlanError> {
    let taken = |m: &Demand<'_>| m.weight_bytes + working_bytes(m.config, options);
    let taken = models.iter().map(taken).sum::<u64>() + RESERVE_BYTES;
    let budget = match free_bytes {
        Some(free) => (free.saturating_sub(taken) as f64 * KV_SHARE) as u64,
        None => KV_BYTES_UNKNOWN,
    };
    models.iter().map(|model| limits(model, options, budget / models.len() as u64)).collect()
}

/// Bounds of one model that may take `budget` bytes for KV.
fn limits(model: &Demand<'_>, options: &PlanOptions, budget: u64) -> Result<Limits, PlanError> {
    let config = model.config;
    let max = config.context_len;
    if let Some(asked) = options.ctx_size.filter(|&asked| asked > max) {
        return Err(PlanError::BeyondModel { asked, max });
    }
    let block_bytes = block_bytes(config, options.kv_dtype);
    let affordable = usize::try_from(budget / block_bytes).unwrap_or(usize::MAX);
    let fits = affordable.saturating_mul(BLOCK_LEN);
    let context_len = options.ctx_size.unwrap_or(max.min(fits));
    if context_len == 0 || context_len > fits {
        let context_len = context_len.max(BLOCK_LEN);
        let needed = context_len.div_ceil(BLOCK_LEN) as u64 * block_bytes;
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
    })
}

/// Activations of one forward pass and the logits that it may yield, twice over.
fn working_bytes(config: &ModelConfig, options: &PlanOptions) -> u64 {
    let widths =
        4 * config.hidden_len + 2 * config.ffn_len + 2 * config.q_len() + 4 * config.kv_len();
    let rows = options.batch_tokens.max(options.running_len) * widths;
    let logits = 2 * (options.running_len + SCORE_CHUNK) * config.vocab_len;
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
        }
    }

    fn alone(options: PlanOptions, vocab_len: usize, kv_budget: u64) -> Result<Limits, PlanError> {
        let config = hearth_models::tiny::config();
        limits(&Demand { config: &config, vocab_len, weight_bytes: 0 }, &options, kv_budget)
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

    #[test]
    fn weights_of_all_models_come_before_keys_and_values_of_any() {
        let config = hearth_models::tiny::config();
        let demand = |weight_bytes| Demand { config: &config, vocab_len: 512, weight_bytes };
        let free = (4 << 30) + RESERVE_BYTES + 2 * working_bytes(&config, &options()) + 30_000_000;
        for models in [[demand(3 << 30), demand(1 << 30)], [demand(1 << 30), demand(3 << 30)]] {
            let limits = plan(&models, &options(), Some(free)).unwrap();
            // A little rounding in the share of 75 %.
            assert!(limits.iter().all(|l| l.kv_blocks == 256 && l.context_len == 1024));
            assert!(plan(&models, &options(), Some(free - 30_000_000)).is_err());
        }
        assert!(plan(&[demand(1 << 40)], &options(), None).is_ok(), "nothing is known");
    }

    #[test]
    fn this_machine_has_memory() {
        assert!(free_bytes().is_none_or(|free| free > 1 << 20));
    }
}
