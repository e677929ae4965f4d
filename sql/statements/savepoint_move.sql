-- Deferred constraints are looked at, and are deferred again: a violation is found where it comes from, and not by COMMIT.
savepoint pgonce_constraints;
set constraints all immediate;
rollback to savepoint pgonce_constraints;
release savepoint pgonce_slice;
savepoint pgonce_slice
