//! What holds, in words: one line for each value.

use super::{Config, Speculate};

impl Config {
    /// One line for each value, keys hidden.
    pub fn describe(&self) -> String {
        let plan = &self.plan;
        let ctx = plan.ctx_size.map_or("what fits".to_owned(), |n| n.to_string());
        let names: Vec<_> =
            self.model_aliases.iter().map(|(name, id)| format!("{name}={id}")).collect();
        let lines = [
            (
                "models",
                match self.models.is_empty() {
                    true => "none named: the built-in one, if this build has it".to_owned(),
                    false => self.models.join(", "),
                },
            ),
            ("listen", self.base_url(self.address())),
            ("device", self.device.clone()),
            ("tensor-parallel", self.tensor_parallel.to_string()),
            ("threads", self.threads.to_string()),
            ("ctx-size", ctx),
            ("quantize", self.quantize.map_or("no", |mix| mix.name()).to_owned()),
            ("kv-dtype", plan.kv_dtype.name().to_owned()),
            ("kv-prefault", plan.kv_prefault.to_string()),
            (
                "speculate",
                match &self.speculate {
                    Speculate::Off => "off".to_owned(),
                    Speculate::Ngram => "ngram".to_owned(),
                    Speculate::Draft(model) => format!("draft by {model}"),
                },
            ),
            ("max-running", plan.running_len.to_string()),
            ("max-queue", plan.queue_len.to_string()),
            ("batch-tokens", plan.batch_tokens.to_string()),
            ("target-itl-ms", plan.target_itl.as_millis().to_string()),
            (
                "queue-timeout-s",
                plan.queue_timeout.map_or("none".to_owned(), |t| t.as_secs().to_string()),
            ),
            (
                "models-dir",
                self.memory.models_dir.as_ref().map_or("none".into(), |d| d.display().to_string()),
            ),
            ("keep-alive", self.memory.keep_alive.to_string()),
            ("pin", listed(&self.memory.pins)),
            ("model-alias", listed(&names)),
            ("lora", self.describe_loras()),
            ("kv-store", self.describe_kv_store()),
            ("send-timeout-s", self.send_timeout.as_secs().to_string()),
            ("body-limit-mb", (self.body_limit_bytes >> 20).to_string()),
            ("files-quota-gb", (self.files_quota_bytes >> 30).to_string()),
            ("store-days", self.store_days.map_or("for ever".to_owned(), |days| days.to_string())),
            ("cors-origin", listed(&self.cors_origins)),
            (
                "api-key",
                match self.api_keys.len() {
                    0 => "none; those of `hearth keys` hold".to_owned(),
                    n => format!("{n} set"),
                },
            ),
            ("lenient-fields", self.lenient_fields.to_string()),
            (
                "data-dir",
                match &self.data_dir {
                    Some(folder) => folder.display().to_string(),
                    None => "none: what is stored is gone with the process".to_owned(),
                },
            ),
        ];
        lines.map(|(name, value)| format!("  {name:<15} {value}")).join("\n")
    }

    fn describe_loras(&self) -> String {
        let mb = self.lora_bytes >> 20;
        match (self.loras.len(), self.lora_dirs.len()) {
            (0, 0) => "none".to_owned(),
            (n, dirs) => format!("{n} named, {dirs} folders; in memory up to {mb} MB"),
        }
    }

    fn describe_kv_store(&self) -> String {
        match &self.kv_store {
            None => "none".to_owned(),
            Some((folder, bytes)) => format!("{}, up to {} MB", folder.display(), bytes >> 20),
        }
    }
}

fn listed(words: &[String]) -> String {
    if words.is_empty() { "none".to_owned() } else { words.join(", ") }
}
