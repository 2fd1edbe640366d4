//! Rotations of every position, on the device, for as many positions as batches have reached.

use std::sync::Arc;

use hearth_kernels::cuda::{Gpu, RopeTable};

use crate::Result;
use crate::backend::AttentionParams;
use crate::layers::rotary::{Rotaries, Rotary};

/// Positions of the first tables.
const POSITIONS: usize = 4096;

/// Tables of one model.
pub(super) struct Ropes {
    /// Positions of each.
    pub positions: usize,
    global: RopeTable,
    /// Of layers with a window, where they turn otherwise.
    local: Option<RopeTable>,
}

impl Ropes {
    /// Those that are there, or larger ones where a batch reaches beyond them.
    pub fn reaching(
        there: &mut Option<Arc<Self>>,
        gpu: &Gpu,
        rotaries: &Rotaries,
        positions: usize,
    ) -> Result<Arc<Self>> {
        if let Some(ropes) = there.as_ref().filter(|ropes| ropes.positions >= positions) {
            return Ok(Arc::clone(ropes));
        }
        let positions = positions.next_power_of_two().max(POSITIONS);
        let all: Vec<u32> = (0..positions as u32).collect();
        // What still reads the old ones is done before their memory goes.
        gpu.synchronize()?;
        let table = |rotary: &Rotary| {
            let host = rotary.table(&all);
            gpu.rope_table(&host.cos, &host.sin, host.dim / 2)
        };
        let local = rotaries.local.as_ref().map(table).transpose()?;
        let made = Arc::new(Self { positions, global: table(&rotaries.global)?, local });
        *there = Some(Arc::clone(&made));
        Ok(made)
    }

    /// That of a layer.
    pub fn of(&self, params: &AttentionParams) -> &RopeTable {
        self.local.as_ref().filter(|_| params.window.is_some()).unwrap_or(&self.global)
    }
}
