package agent

import (
	"context"
	"crypto/rand"
	"fmt"
	"time"
)

// SeedSize is as much as the key of the guest's generator (BLAKE2S_HASH_SIZE in
// drivers/char/random.c).
const SeedSize = 32

// Renew changes what a guest has in common with others of its template.
func Renew(ctx context.Context, guest interface {
	ReseedRNG(ctx context.Context, data []byte) error
	SetGuestDateTime(ctx context.Context, now time.Time) error
},
) error {
	seed := make([]byte, SeedSize)
	_, _ = rand.Read(seed) // never fails
	if err := guest.ReseedRNG(ctx, seed); err != nil {
		return fmt.Errorf("seed the guest's random generator: %w", err)
	}
	if err := guest.SetGuestDateTime(ctx, time.Now()); err != nil {
		return fmt.Errorf("set the guest's clock: %w", err)
	}
	return nil
}
