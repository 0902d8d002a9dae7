//! (to come)
use crate::base::chunk::ChunkList;
pub const MAX_INLINE_CHUNKS: usize = 1024;
pub fn encode(list: &ChunkList) -> Vec<u8> {
    let _ = list;
    todo!()
}
