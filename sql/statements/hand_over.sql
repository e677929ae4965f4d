select pgonce.hand_over($1, $2, $3, handler => $4::text::xid8)
