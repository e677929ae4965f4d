rollback to savepoint pgonce_slice;
release savepoint pgonce_slice
