//! Sums over several devices, by NCCL.
//!
//! Each device's part is asked for on its own stream, by a thread of its own, and is ordered with
//! everything else there. Nothing here knows whether the others will ask too: whoever calls makes
//! sure of it, and calls [`Communicators::abort`] when one of them cannot, which ends what has
//! begun on the others.
//!
//! A sum only asks: its thread waits for nobody, so neither does an abort, which needs the same
//! communicator. The first sum of a kind is another matter, in which NCCL waits on the host for all
//! devices to connect; so those are made when devices are brought together, by one thread for all
//! of them, where none can be missing.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::nccl::{result, sys};

use super::{Error, Float, Gpu, Result, Rows};

/// Numbers of the sums by which devices get to know each other: of one row of a narrow model up to
/// many of a wide one.
const KINDS: [usize; 4] = [1 << 10, 1 << 15, 1 << 19, 1 << 23];

/// Devices that add up what they have, one rank each.
pub struct Communicators {
    /// Of each rank; none after a failure. They end before their devices do.
    comms: Vec<Mutex<Option<Comm>>>,
    gpus: Vec<Arc<Gpu>>,
}

struct Comm(sys::ncclComm_t);

// SAFETY: NCCL binds a communicator to no thread; the mutex around it lets one in at a time.
unsafe impl Send for Comm {}

impl Drop for Comm {
    fn drop(&mut self) {
        // SAFETY: made by `ncclCommInitAll`, ended once. It also ends what is still running.
        let ended = unsafe { result::comm_abort(self.0) };
        // Nobody is left to whom a failure would matter.
        drop(ended);
    }
}

impl std::fmt::Debug for Communicators {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Communicators of {} devices", self.gpus.len())
    }
}

impl Communicators {
    /// Brings devices together; none of them twice.
    pub fn new(gpus: Vec<Arc<Gpu>>) -> Result<Self> {
        let comms = gpus.iter().map(|_| Mutex::default()).collect();
        let all = Self { comms, gpus };
        all.renew()?;
        Ok(all)
    }

    /// How many devices there are.
    pub fn len(&self) -> usize {
        self.gpus.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.gpus.is_empty()
    }

    /// Brings them together again, after [`Communicators::abort`].
    pub fn renew(&self) -> Result<()> {
        // What was asked for before the failure still reads what the next pass will write.
        self.gpus.iter().try_for_each(|gpu| gpu.synchronize())?;
        let ordinal = |gpu: &Arc<Gpu>| i32::try_from(gpu.context.ordinal());
        let ordinals = self.gpus.iter().map(ordinal).collect::<std::result::Result<Vec<_>, _>>();
        let ordinals = ordinals.map_err(|_| Error::Missing("a device with that number".into()))?;
        let count = i32::try_from(ordinals.len());
        let count = count.map_err(|_| Error::Missing("so many devices".into()))?;
        let mut made = vec![std::ptr::null_mut(); ordinals.len()];
        // SAFETY: room for as many communicators as there are ordinals.
        unsafe { result::comm_init_all(made.as_mut_ptr(), count, ordinals.as_ptr())? };
        for (place, comm) in self.comms.iter().zip(made) {
            *lock(place) = Some(Comm(comm));
        }
        self.connect()
    }

    /// Sums short and long, each on all devices at once: NCCL has a way for each kind, and connects
    /// the devices of a way when it first takes it.
    fn connect(&self) -> Result<()> {
        for float in [Float::F32, Float::BF16] {
            for len in KINDS {
                let all = self.gpus.iter().map(|gpu| gpu.rows(1, len, float));
                let all = all.collect::<Result<Vec<_>>>()?;
                result::group_start()?;
                let asked = all.iter().enumerate().try_for_each(|(rank, x)| self.ask(rank, x));
                // A group that was begun is ended, whatever came of it.
                let ended = result::group_end();
                asked?;
                ended?;
            }
        }
        self.gpus.iter().try_for_each(|gpu| gpu.synchronize())
    }

    /// Ends what the devices have begun together and not ended, and parts them.
    pub fn abort(&self) {
        for comm in &self.comms {
            drop(lock(comm).take());
        }
    }

    /// The sum of what all ranks have, in place, once the stream comes to it.
    pub fn sum(&self, rank: usize, x: Rows) -> Result<Rows> {
        self.ask(rank, &x)?;
        Ok(x)
    }

    fn ask(&self, rank: usize, x: &Rows) -> Result<()> {
        let gpu = &self.gpus[rank];
        let comm = lock(&self.comms[rank]);
        let comm =
            comm.as_ref().ok_or_else(|| Error::Missing("devices that have parted".into()))?;
        let kind = match x.float() {
            Float::F32 => sys::ncclDataType_t::ncclFloat32,
            Float::BF16 => sys::ncclDataType_t::ncclBfloat16,
        };
        let (place, stream) = (x.place(), gpu.stream.cu_stream());
        gpu.context.bind_to_thread()?;
        // SAFETY: `len` elements of that type on this rank's device, read and written in the order
        // of its stream.
        unsafe {
            result::all_reduce(
                place as *const _,
                place as *mut _,
                x.len(),
                kind,
                sys::ncclRedOp_t::ncclSum,
                comm.0,
                stream.cast(),
            )?;
        }
        Ok(())
    }
}

fn lock(comm: &Mutex<Option<Comm>>) -> MutexGuard<'_, Option<Comm>> {
    comm.lock().unwrap_or_else(PoisonError::into_inner)
}
