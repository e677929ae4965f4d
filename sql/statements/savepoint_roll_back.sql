rollback to savepoint pgonce_slice
