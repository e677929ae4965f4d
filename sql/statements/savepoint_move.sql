release savepoint pgonce_slice;
savepoint pgonce_slice
