//! `hearth doctor`: what this machine offers, what would be used, and whether a model fits.

use hearth_kernels::{Isa, cpu, pool};

use super::{Common, Failure, open};
use crate::registry::plan;

pub(super) fn run(common: Common) -> Result<(), Failure> {
    let config = common.validate()?;
    let compute = open::compute(&config)?;
    let features = cpu::features();
    let names = |have: bool| {
        let names = features.iter().filter(|f| f.1 == have).map(|f| f.0);
        names.collect::<Vec<_>>().join(" ")
    };
    let isas = Isa::available().iter().map(|isa| isa.name()).collect::<Vec<_>>().join(", ");
    println!("program     hearth {}", env!("CARGO_PKG_VERSION"));
    println!("processor   has {}", names(true));
    println!("            lacks {}", names(false));
    println!("kernels     {} (available: {isas})", Isa::best().name());
    println!("threads     {} (default {})", config.threads, pool::default_threads());
    println!("device      {}", compute.describe());
    println!("free memory {} MB", plan::free_bytes() >> 20);
    for name in &config.models {
        let path = open::named_path(name)?;
        let file = hearth_models::open(&path)?;
        let (model, weights) = (file.config(), file.weights().tensor_bytes());
        println!("\nmodel       {}", path.display());
        println!("family      {}, {} layers", model.family, model.layer_count);
        println!("weights     {} MB", weights >> 20);
        let free = plan::free_bytes();
        let limits = plan::plan(model, &config.plan, model.vocab_len, weights, free)?;
        let kv = limits.kv_blocks as u64 * plan::block_bytes(model, config.plan.kv_dtype);
        println!("context     {} tokens of {}", limits.context_len, model.context_len);
        println!("keys+values {} MB for {} blocks", kv >> 20, limits.kv_blocks);
    }
    Ok(())
}
