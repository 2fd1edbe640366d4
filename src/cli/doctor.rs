//! `hearth doctor`: what this machine offers, what would be used, and whether a model fits.

use std::io::{self, Write};

use hearth_kernels::{Isa, cpu, pool};

use super::{Common, Failure, open};
use crate::registry::plan;

pub(super) fn run(common: Common) -> Result<(), Failure> {
    let config = common.validate()?;
    let out = &mut io::stdout().lock();
    let compute = open::compute(&config)?;
    let features = cpu::features();
    let names = |have: bool| {
        let names = features.iter().filter(|f| f.1 == have).map(|f| f.0);
        names.collect::<Vec<_>>().join(" ")
    };
    let isas = Isa::available().iter().map(|isa| isa.name()).collect::<Vec<_>>().join(", ");
    writeln!(out, "program     hearth {}", env!("CARGO_PKG_VERSION"))?;
    writeln!(out, "processor   has {}", names(true))?;
    writeln!(out, "            lacks {}", names(false))?;
    writeln!(out, "kernels     {} (available: {isas})", Isa::best().name())?;
    writeln!(out, "threads     {} (default {})", config.threads, pool::default_threads())?;
    writeln!(out, "device      {}", compute.describe())?;
    writeln!(out, "free memory {} MB", plan::free_bytes() >> 20)?;
    for name in &open::names(&config)? {
        let file = open::named(name)?;
        let (model, weights) = (file.config(), file.weights().tensor_bytes());
        writeln!(out, "\nmodel       {}", file.path().display())?;
        writeln!(out, "family      {}, {} layers", model.family, model.layer_count)?;
        writeln!(out, "weights     {} MB", weights >> 20)?;
        let free = plan::free_bytes();
        let limits = plan::plan(model, &config.plan, model.vocab_len, weights, free)?;
        let kv = limits.kv_blocks as u64 * plan::block_bytes(model, config.plan.kv_dtype);
        writeln!(out, "context     {} tokens of {}", limits.context_len, model.context_len)?;
        writeln!(out, "keys+values {} MB for {} blocks", kv >> 20, limits.kv_blocks)?;
    }
    Ok(())
}
